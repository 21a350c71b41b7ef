#include "open.h"

#include "../graph/program.h"
#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

lla_status lla_open_check(llaisysDeviceType_t device, const int *device_ids, int ndevice) {
    LLA_REQUIRE(device == LLAISYS_DEVICE_CPU || device == LLAISYS_DEVICE_NVIDIA, LLA_EINVAL, "unknown device type %d",
                device);
    LLA_REQUIRE(ndevice == 1, LLA_EINVAL, "%d devices were asked for, expected 1: tensor parallelism is not there yet",
                ndevice);
    const int id = device_ids ? device_ids[0] : 0, count = lla_device_get(device)->count();
    LLA_REQUIRE(count > 0, LLA_EDEVICE, "device %s was asked for, but there is none", lla_device_get(device)->name);
    LLA_REQUIRE(id >= 0 && id < count, LLA_EINVAL, "%s device %d was asked for, expected 0 to %d",
                lla_device_get(device)->name, id, count - 1);
    return LLA_OK;
}

lla_status lla_open_resolve(const char *path, const struct LlaisysQwen2Options *options, struct lla_spec *spec,
                            struct lla_limits *limits, struct lla_checkpoint **checkpoint) {
    LLA_REQUIRE(path, LLA_EINVAL, "the model's path is NULL");
    LLA_REQUIRE(!options->dtype || lla_dtype_is_compute(options->dtype), LLA_EINVAL,
                "dtype %s, expected bf16, f16 or f32", lla_dtype_name(options->dtype));
    LLA_TRY(lla_spec_load(path, spec));
    lla_status status = LLA_OK;
    if (options->dtype) spec->dtype = options->dtype;
    if (!lla_dtype_is_compute(spec->dtype) || checkpoint) {
        struct lla_checkpoint *opened = NULL;
        LLA_TRY(lla_checkpoint_open(path, &opened));
        if (!lla_dtype_is_compute(spec->dtype)) { /* a config that does not say: as the weights are */
            const struct lla_st_tensor *embed = lla_checkpoint_find(opened, "model.embed_tokens.weight");
            spec->dtype = embed ? embed->dtype : LLAISYS_DTYPE_INVALID;
        }
        if (checkpoint)
            *checkpoint = opened;
        else
            lla_checkpoint_close(opened);
    }
    *limits = (struct lla_limits){
        .device = options->device, .max_seq = options->maxseq, .prefill_chunk = options->prefill_chunk};
    if ((status = lla_spec_check(spec))) {
        if (checkpoint) lla_checkpoint_close(*checkpoint), *checkpoint = NULL;
        return lla_fail_in(status, "%s", path);
    }
    return LLA_OK;
}

char *lla_open_plan(const struct lla_spec *spec, const struct lla_limits *limits, const char *format) {
    static const char *const names[] = {"text", "json", "svg"};
    size_t f = 0;
    while (f < 3 && (!format || strcmp(format, names[f]))) f++;
    if (f == 3) {
        lla_fail(LLA_EINVAL, "plan format '%s', expected text, json or svg", format ? format : "(null)");
        return NULL;
    }
    struct lla_graph graph;
    if (lla_graph_make(spec, limits, (struct lla_shard){0, 1}, &graph)) return NULL;
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    lla_status status =
        out ? lla_plan_render(&graph.plan, (enum lla_plan_format)f, out) : lla_fail(LLA_ENOMEM, "no memory for text");
    if (out && fclose(out) && !status) status = lla_fail(LLA_ENOMEM, "no memory for text");
    lla_graph_free(&graph);
    if (!status) return text;
    free(text);
    return NULL;
}

void lla_open_meta(const struct lla_plan *plan, struct LlaisysQwen2Meta *meta) {
    const struct lla_spec *s = &plan->spec;
    *meta = (struct LlaisysQwen2Meta){.dtype = s->dtype,
                                      .nlayer = s->nlayer,
                                      .hs = s->hidden,
                                      .nh = s->nhead,
                                      .nkvh = s->nkvhead,
                                      .dh = s->head_dim,
                                      .di = s->ffn,
                                      .maxseq = plan->limits.max_seq,
                                      .voc = s->vocab,
                                      .epsilon = s->eps,
                                      .theta = (float)s->theta,
                                      .end_token = s->neos ? s->eos[0] : -1};
}

bool lla_open_is_end(const struct lla_plan *plan, int64_t token) {
    for (size_t i = 0; i < plan->spec.neos; i++)
        if (plan->spec.eos[i] == token) return true;
    return false;
}
