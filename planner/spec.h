/* spec.h: a validated description of a Qwen2-architecture model. */
#ifndef LLA_SPEC_H
#define LLA_SPEC_H

#include "../base/dtype.h"
#include "../base/status.h"

enum { LLA_MAX_EOS = 16 };

struct lla_spec {
    llaisysDataType_t dtype; /* of the arithmetic: bf16, f16 or f32; INVALID in a config that does not say */
    size_t nlayer;
    size_t hidden;
    size_t nhead, nkvhead; /* query heads, KV heads; nhead % nkvhead == 0 */
    size_t head_dim;       /* even */
    size_t ffn;
    size_t vocab;
    size_t max_position; /* tokens of context the model was made for */
    bool tied;           /* lm_head is the embedding table */
    float eps;           /* of RMSNorm */
    double theta;        /* RoPE base */
    int64_t eos[LLA_MAX_EOS];
    size_t neos;
};

/* Refuses a spec that no engine could run: zero or absurd sizes, heads that do not divide, odd head_dim, non-positive
 * eps or theta. */
lla_status lla_spec_check(const struct lla_spec *spec);

/* Parses the text of a config.json; `label` names the file in errors. The text needs no terminator. */
lla_status lla_spec_parse(const char *text, size_t nbytes, const char *label, struct lla_spec *out);

/* Adds the end tokens of a generation_config.json's text to those of the spec. */
lla_status lla_spec_parse_generation(const char *text, size_t nbytes, const char *label, struct lla_spec *spec);

/* Reads config.json and, where it is there, generation_config.json of a model folder. */
lla_status lla_spec_load(const char *dir, struct lla_spec *out);

#endif
