/* exec_cpu.c: the CPU executor: a crew of threads walks the list. */
#include "../kernels/cpu/crew.h"
#include "program.h"

struct walk {
    const struct lla_program *program;
    struct lla_ctx ctx;
    struct lla_crew *crew;
    size_t first, last;
};

static void run_node(const struct lla_ctx *ctx, const struct lla_node *node, struct lla_team team) {
    switch (node->op) {
#define X(NAME, suffix)                                                                                                \
    case LLA_OP_##NAME:                                                                                                \
        lla_cpu_##suffix(ctx, &node->suffix, team);                                                                    \
        break;
        LLA_NODE_OPS(X)
#undef X
    case LLA_OP_COUNT:
        break;
    }
}

static void walk(void *arg, size_t rank) {
    const struct walk *w = arg;
    const struct lla_team team = {.rank = rank, .size = lla_crew_size(w->crew), .crew = w->crew};
    for (size_t i = w->first; i < w->last; i++) {
        run_node(&w->ctx, &w->program->nodes[i], team);
        lla_crew_barrier(w->crew);
    }
}

void lla_exec_cpu(const struct lla_program *program, char *arena, struct lla_crew *crew, size_t first, size_t last) {
    struct walk w = {.program = program,
                     .ctx = {.arena = arena, .dims = &program->graph->dims, .io = &program->graph->io},
                     .crew = crew,
                     .first = first,
                     .last = last};
    lla_crew_run(crew, walk, &w);
}
