/* load.h: copies a checkpoint's weights into an arena, once, converting dtypes where they differ. */
#ifndef LLA_LOAD_H
#define LLA_LOAD_H

#include "runner.h"

/* Called on the loading thread after every tensor. */
typedef void (*lla_progress)(size_t done_bytes, size_t total_bytes);

/* Writes every weight of the runner's plan to its place. Each source tensor must be there with the shape that the spec
 * asks for. */
lla_status lla_load_weights(struct lla_runner *runner, const struct lla_checkpoint *checkpoint, lla_progress progress);

/* A progress bar on standard error; draws nothing where that is no terminal. */
void lla_progress_bar(size_t done_bytes, size_t total_bytes);

#endif
