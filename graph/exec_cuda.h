/* exec_cuda.h: the CUDA executor: a device arena, programs captured once as graphs, replayed for every step.
 *
 * All that changes from step to step lies in the step region, of which there are two: one for every other step. The
 * host writes a region in a pinned mirror of its own, one copy brings it to the device (biases and masks, where a step
 * has some, by copies of their own, no longer than they are), the graph follows, and a copy of the chosen tokens.
 * Copies have streams of their own: what the next step needs comes while a step runs, and what it chose leaves while
 * the next one runs, so that the device goes from graph to graph. Each program is captured twice, once a region, and no
 * graph is ever updated. Capture happens in lla_exec_cuda_capture(); after that nothing is allocated. */
#ifndef LLA_EXEC_CUDA_H
#define LLA_EXEC_CUDA_H

#include "program.h"

#ifdef __cplusplus
extern "C" {
#endif

struct lla_exec_cuda;

/* Bytes of device memory that are free. */
lla_status lla_exec_cuda_available(int device_id, size_t *nbytes);

/* One cudaMalloc for the graph's plan, zeroed, with the tables in it. The graph must outlive the executor. */
lla_status lla_exec_cuda_create(const struct lla_graph *graph, int device_id, struct lla_exec_cuda **out);
void lla_exec_cuda_destroy(struct lla_exec_cuda *exec); /* NULL is allowed */

/* Stores rows [dst_row, dst_row + rows) of a weight, given dense [rows, w->cols] in host memory, in the form that the
 * kernels read. */
lla_status lla_exec_cuda_store(struct lla_exec_cuda *exec, const struct lla_weight *w, size_t dst_row, size_t rows,
                               const void *dense);

/* Captures two graphs a program. */
lla_status lla_exec_cuda_capture(struct lla_exec_cuda *exec, const struct lla_program *programs, size_t count);

/* The arena's address on the device. */
char *lla_exec_cuda_arena(struct lla_exec_cuda *exec);

/* Address to which offsets of the (first) step region can be added: the host's mirror of region 0 or 1. What a step
 * brings back lies there, too. */
char *lla_exec_cuda_inputs(struct lla_exec_cuda *exec, size_t mirror);

struct lla_cuda_step {
    size_t program;              /* of those captured */
    size_t mirror;               /* in turns, so that a step is fed by the other region */
    size_t nlogit, nbias, nmask; /* tokens to bring back; biases and masks in use */
    bool wants_odds;             /* to be brought back, too */
};

/* Puts a step into the streams: its inputs' copies, the program, its results' copies. The mirror and its region belong
 * to the step until that has been waited for. */
lla_status lla_exec_cuda_launch(struct lla_exec_cuda *exec, const struct lla_cuda_step *step);

/* Waits for the mirror's step, and adds to *seconds what its program took, by the device's clock. */
lla_status lla_exec_cuda_wait(struct lla_exec_cuda *exec, size_t mirror, double *seconds);

/* Copies bytes of the arena to host memory, and back. */
lla_status lla_exec_cuda_read(struct lla_exec_cuda *exec, size_t offset, size_t nbytes, void *out);
lla_status lla_exec_cuda_write(struct lla_exec_cuda *exec, size_t offset, size_t nbytes, const void *in);

/* Runs nodes [first, last) of a program one by one, without a graph, with the inputs that lie in the first step region:
 * for comparing executors. */
lla_status lla_exec_cuda_nodes(struct lla_exec_cuda *exec, const struct lla_program *program, size_t first,
                               size_t last);

/* Median, and the tenth and ninetieth percentile, of the milliseconds of `count` replays in a row of a program with its
 * copies, with the inputs as they are (a decode step repeated in place). Ops in the bit set `skip` are left out: what a
 * stage costs is the difference that its absence makes. */
lla_status lla_exec_cuda_time(struct lla_exec_cuda *exec, const struct lla_program *program, unsigned skip,
                              size_t count, double ms[3]);

/* Replays a program a few times and writes when each block of its kernels ran, as CSV: node, name, layer, block, sm,
 * began, free, staged, ended (ns of the last replay; 0: not noted). For builds with -Dstep_trace=true. */
lla_status lla_exec_cuda_trace(struct lla_exec_cuda *exec, const struct lla_program *program, FILE *out);

/* GB/s of the best plain read of the arena's weights: the ceiling of decode. */
lla_status lla_exec_cuda_read_ceiling(struct lla_exec_cuda *exec, double *gbs);

#ifdef __cplusplus
}
#endif

#endif
