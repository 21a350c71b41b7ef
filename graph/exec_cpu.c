/* exec_cpu.c: the CPU executor: a team of threads walks the list. */
#include "program.h"

#include <omp.h>

static void run_node(const struct lla_ctx *ctx, const struct lla_node *node, struct lla_team team) {
    switch (node->op) {
#define X(NAME, suffix) \
    case LLA_OP_##NAME: lla_cpu_##suffix(ctx, &node->suffix, team); break;
        LLA_NODE_OPS(X)
#undef X
    case LLA_OP_COUNT: break;
    }
}

void lla_exec_cpu(const struct lla_program *program, char *arena, int nthread, size_t first, size_t last) {
    const struct lla_ctx ctx = {.arena = arena, .dims = &program->graph->dims, .io = &program->graph->io};
#pragma omp parallel num_threads(nthread)
    {
        const struct lla_team team = {(size_t)omp_get_thread_num(), (size_t)omp_get_num_threads()};
        for (size_t i = first; i < last; i++) {
            run_node(&ctx, &program->nodes[i], team);
#pragma omp barrier
        }
    }
}
