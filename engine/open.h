/* open.h: what opening a model folder takes, for the model of one sequence and for the engine. */
#ifndef LLA_OPEN_H
#define LLA_OPEN_H

#include "../include/llaisys/models/qwen2.h"
#include "../planner/plan.h"

/* Refuses devices that are not there. */
lla_status lla_open_check(llaisysDeviceType_t device, const int *device_ids, int ndevice);

/* The spec and limits that a folder and options give. checkpoint may be NULL; else it is opened, and the caller closes
 * it. */
lla_status lla_open_resolve(const char *path, const struct LlaisysQwen2Options *options, struct lla_spec *spec,
                            struct lla_limits *limits, struct lla_checkpoint **checkpoint);

/* The plan as text, JSON or a picture: a malloc'ed string, or NULL. */
char *lla_open_plan(const struct lla_spec *spec, const struct lla_limits *limits, const char *format);

/* The dimensions of a planned model. */
void lla_open_meta(const struct lla_plan *plan, struct LlaisysQwen2Meta *meta);
/* Whether a token is one of the model's end tokens. */
bool lla_open_is_end(const struct lla_plan *plan, int64_t token);

#endif
