/* runner.h: an arena with its programs: takes a step's rows, runs the smallest bucket that holds them, returns the
 * tokens.
 *
 * All memory is taken by lla_runner_create; a step allocates nothing. One thread at a time. */
#ifndef LLA_RUNNER_H
#define LLA_RUNNER_H

#include "../graph/program.h"
#include "../kernels/cpu/crew.h"

enum { LLA_MAX_BUCKETS = 24 };

struct lla_runner {
    struct lla_graph graph;
    char *base;                       /* the arena, wherever it lies */
    char *arena;                      /* host memory; NULL where the arena lies on a GPU */
    struct lla_exec_cuda *cuda;       /* the GPU's executor; NULL on the CPU */
    char *inputs;                     /* where the host writes the step region: offsets of the arena apply */
    struct lla_candidate *candidates; /* [vocab], for tokens that are drawn on the host for a GPU */
    void *logits_row;                 /* [vocab], likewise */
    struct lla_crew *crew;
    struct lla_program programs[LLA_MAX_BUCKETS]; /* by rows, ascending */
    size_t nprogram;
    bool is_ready;
    double alloc_seconds, build_seconds;
};

/* One sequence's part in a step: its next tokens at positions position0, position0 + 1, ... */
struct lla_step_seq {
    size_t slot; /* row of the block table, below max_seqs; one entry a slot */
    const int64_t *tokens;
    size_t ntoken; /* positive */
    size_t position0;
    const int32_t *blocks;            /* KV blocks of positions 0 .. position0 + ntoken - 1 */
    bool want_next;                   /* the token behind the last one */
    struct lla_sampling_row sampling; /* position is filled in */
    /* where `sampling` asks for them */
    const int64_t *known;           /* [position0 + ntoken]: the sequence from its beginning, for penalties */
    size_t nprompt;                 /* of these, the prompt's */
    const struct lla_bias *bias;    /* [sampling.nbias] */
    struct lla_candidate *logprobs; /* [sampling.nlogprob], written by the step: as struct lla_draw */
    const uint32_t *mask;           /* [ceil(vocab / 32)] words, a set bit allows the token; NULL: all are allowed */
};

/* nthread 0: one CPU thread a core. */
lla_status lla_runner_create(const struct lla_spec *spec, const struct lla_limits *limits, struct lla_shard shard,
                             int device_id, int nthread, struct lla_runner *runner);
void lla_runner_destroy(struct lla_runner *runner);

/* Stores rows [dst_row, dst_row + rows) of a weight from dense host memory [rows, w->cols] of the model's dtype. */
lla_status lla_runner_store(struct lla_runner *runner, const struct lla_weight *w, size_t dst_row, size_t rows,
                            const void *dense);

/* Makes the programs ready to run; after the weights, before the first step. */
lla_status lla_runner_ready(struct lla_runner *runner);

/* Runs one step. next [nseq]: the chosen token of each sequence that wants one, else -1. Refuses what the plan does not
 * hold, before anything is changed. */
lla_status lla_runner_step(struct lla_runner *runner, const struct lla_step_seq *seqs, size_t nseq, int64_t *next);

/* Logits of the i-th sequence that wanted a next token in the last step, as f32 [vocab]. */
lla_status lla_runner_logits(struct lla_runner *runner, size_t i, float *logits);

#endif
