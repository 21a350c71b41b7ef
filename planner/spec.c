/* spec.c: config.json and generation_config.json -> a validated spec. */
#include "spec.h"

#include "json.h"

#include <cJSON.h>
#include <math.h>
#include <stdlib.h>

enum { CONFIG_LIMIT = 16 << 20 /* bytes */ };

/* Bounds far above any model, low enough that no sum of bytes over a model overflows 64 bits: with q, k, v no wider
 * than 2^20 and f32, weights take at most 4096 layers * 2^20 * (4 * 2^20 + 3 * 2^22) * 4 bytes = 2^58, and the KV of
 * one token at most 2^36. */
static const size_t max_layer = 4096, max_hidden = 1 << 20, max_head = 4096, max_head_dim = 1024, max_ffn = 1 << 22,
                    max_vocab = 1 << 24, max_context = 1 << 24, max_attention = 1 << 20;

lla_status lla_spec_check(const struct lla_spec *spec) {
    const struct {
        const char *name;
        size_t value, max;
    } sizes[] = {
        {"hidden_size", spec->hidden, max_hidden},      {"num_hidden_layers", spec->nlayer, max_layer},
        {"num_attention_heads", spec->nhead, max_head}, {"num_key_value_heads", spec->nkvhead, max_head},
        {"head_dim", spec->head_dim, max_head_dim},     {"intermediate_size", spec->ffn, max_ffn},
        {"vocab_size", spec->vocab, max_vocab},         {"max_position_embeddings", spec->max_position, max_context},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        LLA_REQUIRE(sizes[i].value >= 1 && sizes[i].value <= sizes[i].max, LLA_EINVAL,
                    "%s: expected 1 to %zu, found %zu", sizes[i].name, sizes[i].max, sizes[i].value);
    LLA_REQUIRE(spec->nhead % spec->nkvhead == 0, LLA_EINVAL,
                "num_attention_heads: expected a multiple of num_key_value_heads, %zu, found %zu", spec->nkvhead,
                spec->nhead);
    LLA_REQUIRE(spec->head_dim % 2 == 0, LLA_EINVAL,
                "head_dim: expected an even number, as RoPE turns pairs, found %zu", spec->head_dim);
    LLA_REQUIRE(spec->nhead * spec->head_dim <= max_attention, LLA_EINVAL,
                "num_attention_heads * head_dim: expected at most %zu, found %zu", max_attention,
                spec->nhead * spec->head_dim);
    LLA_REQUIRE(spec->dtype == LLAISYS_DTYPE_INVALID || lla_dtype_is_compute(spec->dtype), LLA_EINVAL,
                "dtype: expected bf16, f16 or f32, found %s", lla_dtype_name(spec->dtype));
    LLA_REQUIRE(spec->eps > 0 && spec->eps <= 1, LLA_EINVAL,
                "rms_norm_eps: expected more than 0 and at most 1, found %g", (double)spec->eps);
    LLA_REQUIRE(spec->theta > 0 && isfinite(spec->theta), LLA_EINVAL,
                "rope_theta: expected a finite number above 0, found %g", spec->theta);
    LLA_REQUIRE(spec->neos <= LLA_MAX_EOS, LLA_EINVAL, "eos_token_id: expected at most %d tokens, found %zu",
                LLA_MAX_EOS, spec->neos);
    for (size_t i = 0; i < spec->neos; i++)
        LLA_REQUIRE(spec->eos[i] >= 0 && (size_t)spec->eos[i] < spec->vocab, LLA_EINVAL,
                    "eos_token_id: expected 0 to %zu, below vocab_size, found %lld", spec->vocab - 1,
                    (long long)spec->eos[i]);
    return LLA_OK;
}

/* ---- fields of a JSON object: null counts as absent; errors leave the file's name to the caller ---- */

static const cJSON *field(const cJSON *object, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    return cJSON_IsNull(item) ? NULL : item;
}

static lla_status get_size(const cJSON *object, const char *key, size_t fallback, size_t *out) {
    static const uint64_t max = 0x80000000u;
    char shown[LLA_SHOWN];
    const cJSON *item = field(object, key);
    *out = fallback;
    LLA_REQUIRE(!item || lla_json_integer(item, max, out), LLA_EFORMAT,
                "%s: expected a whole number from 0 to %zu, found %s", key, (size_t)max, lla_json_show(item, shown));
    return LLA_OK;
}

static lla_status need_size(const cJSON *object, const char *key, size_t *out) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    LLA_REQUIRE(field(object, key), LLA_EFORMAT, "%s: expected a whole number, found %s", key,
                item ? "null" : "no such key");
    return get_size(object, key, 0, out);
}

static lla_status get_number(const cJSON *object, const char *key, double fallback, double *out) {
    char shown[LLA_SHOWN];
    const cJSON *item = field(object, key);
    LLA_REQUIRE(!item || (cJSON_IsNumber(item) && isfinite(item->valuedouble)), LLA_EFORMAT,
                "%s: expected a finite number, found %s", key, lla_json_show(item, shown));
    *out = item ? item->valuedouble : fallback;
    return LLA_OK;
}

static lla_status get_bool(const cJSON *object, const char *key, bool *out) {
    char shown[LLA_SHOWN];
    const cJSON *item = field(object, key);
    LLA_REQUIRE(!item || cJSON_IsBool(item), LLA_EFORMAT, "%s: expected true or false, found %s", key,
                lla_json_show(item, shown));
    *out = cJSON_IsTrue(item);
    return LLA_OK;
}

static lla_status add_eos(const cJSON *item, struct lla_spec *spec) {
    char shown[LLA_SHOWN];
    uint64_t token;
    LLA_REQUIRE(lla_json_integer(item, spec->vocab - 1, &token), LLA_EFORMAT,
                "eos_token_id: expected a whole number from 0 to %zu, below vocab_size, found %s", spec->vocab - 1,
                lla_json_show(item, shown));
    for (size_t i = 0; i < spec->neos; i++)
        if (spec->eos[i] == (int64_t)token) return LLA_OK;
    LLA_REQUIRE(spec->neos < LLA_MAX_EOS, LLA_ELIMIT, "eos_token_id: expected at most %d different tokens, found more",
                LLA_MAX_EOS);
    spec->eos[spec->neos++] = (int64_t)token;
    return LLA_OK;
}

/* A token, a list of tokens, or nothing. */
static lla_status get_eos(const cJSON *root, struct lla_spec *spec) {
    const cJSON *item = field(root, "eos_token_id");
    if (!item) return LLA_OK;
    if (!cJSON_IsArray(item)) return add_eos(item, spec);
    for (const cJSON *token = item->child; token; token = token->next) LLA_TRY(add_eos(token, spec));
    return LLA_OK;
}

/* ---- the parts of a config ---- */

/* Written as torch_dtype by transformers 4 and as dtype by transformers 5. */
static lla_status get_dtype(const cJSON *root, llaisysDataType_t *out) {
    static const char *const keys[] = {"dtype", "torch_dtype"};
    char shown[LLA_SHOWN];
    *out = LLAISYS_DTYPE_INVALID;
    for (size_t i = 0; i < 2; i++) {
        const cJSON *item = field(root, keys[i]);
        if (!item) continue;
        const char *name = cJSON_IsString(item) ? item->valuestring : "";
        llaisysDataType_t dtype = !strcmp(name, "bfloat16")  ? LLAISYS_DTYPE_BF16
                                  : !strcmp(name, "float16") ? LLAISYS_DTYPE_F16
                                  : !strcmp(name, "float32") ? LLAISYS_DTYPE_F32
                                                             : LLAISYS_DTYPE_INVALID;
        LLA_REQUIRE(dtype, LLA_EFORMAT, "%s: expected \"bfloat16\", \"float16\" or \"float32\", found %s", keys[i],
                    lla_json_show(item, shown));
        LLA_REQUIRE(!*out || *out == dtype, LLA_EFORMAT, "torch_dtype: expected what dtype says, %s, found %s",
                    lla_dtype_name(*out), lla_dtype_name(dtype));
        *out = dtype;
    }
    return LLA_OK;
}

/* The RoPE base: rope_theta at the top (transformers 4) or in rope_parameters (transformers 5). Scaled RoPE is refused:
 * it would run, and give wrong text. */
static lla_status get_rope(const cJSON *root, double *theta) {
    static const char *const keys[] = {"rope_parameters", "rope_scaling"};
    static const char *const types[] = {"rope_type", "type"};
    char shown[LLA_SHOWN];
    LLA_TRY(get_number(root, "rope_theta", 10000, theta));
    bool found = field(root, "rope_theta");
    for (size_t i = 0; i < 2; i++) {
        const cJSON *rope = field(root, keys[i]);
        if (!rope) continue;
        LLA_REQUIRE(cJSON_IsObject(rope), LLA_EFORMAT, "%s: expected an object or null, found %s", keys[i],
                    lla_json_show(rope, shown));
        bool typed = false;
        for (size_t j = 0; j < 2; j++) {
            const cJSON *type = field(rope, types[j]);
            LLA_REQUIRE(!type || (cJSON_IsString(type) && !strcmp(type->valuestring, "default")), LLA_EFORMAT,
                        "%s: %s: expected \"default\", the only RoPE that is supported, found %s", keys[i], types[j],
                        lla_json_show(type, shown));
            typed |= type != NULL;
        }
        LLA_REQUIRE(typed || !field(rope, "factor"), LLA_EFORMAT,
                    "%s: expected rope_type \"default\", found a factor and no type", keys[i]);
        for (const cJSON *item = rope->child; item; item = item->next)
            LLA_REQUIRE(!cJSON_IsObject(item), LLA_EFORMAT,
                        "%s: expected one set of values for all layers, found an object, '%s'", keys[i],
                        lla_clip(item->string, shown));
        if (!field(rope, "rope_theta")) continue;
        double value = 0;
        LLA_TRY(get_number(rope, "rope_theta", 0, &value));
        LLA_REQUIRE(!found || value == *theta, LLA_EFORMAT,
                    "%s: rope_theta: expected %.15g, as elsewhere in the file, found %.15g", keys[i], *theta, value);
        *theta = value;
        found = true;
    }
    return LLA_OK;
}

/* Every layer attends to the whole context; refuses a config that asks for less. As in transformers, layer_types
 * decides where it is there, else layers from max_window_layers on slide where use_sliding_window says so. */
static lla_status check_attention(const cJSON *root, const struct lla_spec *spec) {
    char shown[LLA_SHOWN];
    const cJSON *types = field(root, "layer_types");
    if (types) {
        LLA_REQUIRE(cJSON_IsArray(types), LLA_EFORMAT, "layer_types: expected an array, found %s",
                    lla_json_show(types, shown));
        size_t count = 0;
        for (const cJSON *type = types->child; type; type = type->next, count++)
            LLA_REQUIRE(cJSON_IsString(type) && !strcmp(type->valuestring, "full_attention"), LLA_EFORMAT,
                        "layer_types: expected only \"full_attention\", found %s for layer %zu",
                        lla_json_show(type, shown), count);
        LLA_REQUIRE(count == spec->nlayer, LLA_EFORMAT,
                    "layer_types: expected %zu entries, as num_hidden_layers, found %zu", spec->nlayer, count);
    }
    bool slides = false;
    size_t window, first;
    LLA_TRY(get_bool(root, "use_sliding_window", &slides));
    LLA_TRY(get_size(root, "sliding_window", 4096, &window));
    LLA_TRY(get_size(root, "max_window_layers", 28, &first));
    const cJSON *window_item = cJSON_GetObjectItemCaseSensitive(root, "sliding_window");
    if (types || !slides || cJSON_IsNull(window_item)) return LLA_OK;
    LLA_REQUIRE(window >= spec->max_position || first >= spec->nlayer, LLA_EFORMAT,
                "use_sliding_window: expected false, as sliding windows are not supported, found true, with a window "
                "of %zu tokens "
                "from layer %zu of %zu on",
                window, first, spec->nlayer);
    return LLA_OK;
}

static lla_status parse_config(const cJSON *root, struct lla_spec *spec) {
    char shown[LLA_SHOWN];
    LLA_REQUIRE(cJSON_IsObject(root), LLA_EFORMAT, "expected a JSON object, found %s", lla_json_show(root, shown));
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(root, "model_type");
    LLA_REQUIRE(cJSON_IsString(type) && !strcmp(type->valuestring, "qwen2"), LLA_EFORMAT,
                "model_type: expected \"qwen2\", the architecture that is supported, found %s",
                lla_json_show(type, shown));
    const cJSON *quantized = field(root, "quantization_config");
    if (quantized) {
        const cJSON *method = cJSON_IsObject(quantized) ? field(quantized, "quant_method") : NULL;
        return lla_fail(
            LLA_EFORMAT,
            "quantization_config: expected none, as only bf16, f16 and f32 checkpoints are supported, found %s",
            lla_json_show(method ? method : quantized, shown));
    }
    const cJSON *act = field(root, "hidden_act");
    LLA_REQUIRE(!act || (cJSON_IsString(act) && !strcmp(act->valuestring, "silu")), LLA_EFORMAT,
                "hidden_act: expected \"silu\", found %s", lla_json_show(act, shown));

    double eps = 0;
    LLA_TRY(need_size(root, "hidden_size", &spec->hidden));
    LLA_TRY(need_size(root, "num_hidden_layers", &spec->nlayer));
    LLA_TRY(need_size(root, "num_attention_heads", &spec->nhead));
    LLA_TRY(get_size(root, "num_key_value_heads", spec->nhead, &spec->nkvhead));
    LLA_TRY(need_size(root, "intermediate_size", &spec->ffn));
    LLA_TRY(need_size(root, "vocab_size", &spec->vocab));
    LLA_TRY(get_size(root, "max_position_embeddings", 32768, &spec->max_position));
    LLA_TRY(get_number(root, "rms_norm_eps", 1e-6, &eps));
    LLA_REQUIRE(eps > 0 && eps <= 1, LLA_EFORMAT, "rms_norm_eps: expected more than 0 and at most 1, found %g", eps);
    spec->eps = (float)eps;
    LLA_TRY(get_bool(root, "tie_word_embeddings", &spec->tied));
    LLA_TRY(get_dtype(root, &spec->dtype));
    LLA_TRY(get_rope(root, &spec->theta));

    bool says_head_dim = field(root, "head_dim");
    if (!says_head_dim && spec->nhead) {
        LLA_REQUIRE(
            spec->hidden % spec->nhead == 0, LLA_EFORMAT,
            "hidden_size: expected a multiple of num_attention_heads, %zu, where head_dim is not given, found %zu",
            spec->nhead, spec->hidden);
        spec->head_dim = spec->hidden / spec->nhead;
    } else
        LLA_TRY(get_size(root, "head_dim", 1, &spec->head_dim));
    LLA_TRY(lla_spec_check(spec));
    LLA_TRY(check_attention(root, spec));
    return get_eos(root, spec);
}

lla_status lla_spec_parse(const char *text, size_t nbytes, const char *label, struct lla_spec *out) {
    struct lla_spec spec = {0};
    cJSON *root;
    memset(out, 0, sizeof *out);
    LLA_TRY(lla_json_parse(text, nbytes, label, &root));
    lla_status status = parse_config(root, &spec);
    cJSON_Delete(root);
    if (status) return lla_fail_in(status == LLA_EINVAL ? LLA_EFORMAT : status, "%s", label);
    *out = spec;
    return LLA_OK;
}

static lla_status parse_generation(const cJSON *root, struct lla_spec *spec) {
    char shown[LLA_SHOWN];
    LLA_REQUIRE(cJSON_IsObject(root), LLA_EFORMAT, "expected a JSON object, found %s", lla_json_show(root, shown));
    return get_eos(root, spec);
}

lla_status lla_spec_parse_generation(const char *text, size_t nbytes, const char *label, struct lla_spec *spec) {
    struct lla_spec with_eos = *spec; /* so that a failure leaves the caller's as it was */
    cJSON *root;
    LLA_TRY(lla_spec_check(spec));
    LLA_TRY(lla_json_parse(text, nbytes, label, &root));
    lla_status status = parse_generation(root, &with_eos);
    cJSON_Delete(root);
    if (status) return lla_fail_in(status, "%s", label);
    *spec = with_eos;
    return LLA_OK;
}

lla_status lla_spec_load(const char *dir, struct lla_spec *out) {
    static const char config[] = "config.json", generation[] = "generation_config.json";
    char shown[LLA_SHOWN], *text;
    size_t nbytes;
    memset(out, 0, sizeof *out);
    LLA_TRY(lla_read_file(dir, config, CONFIG_LIMIT, &text, &nbytes));
    LLA_REQUIRE(text, LLA_EIO, "%s: expected in model folder '%s', found no such file", config, lla_clip(dir, shown));
    lla_status status = lla_spec_parse(text, nbytes, config, out);
    free(text);
    LLA_TRY(status);
    LLA_TRY(lla_read_file(dir, generation, CONFIG_LIMIT, &text, &nbytes));
    if (!text) return LLA_OK;
    status = lla_spec_parse_generation(text, nbytes, generation, out);
    free(text);
    if (status) memset(out, 0, sizeof *out);
    return status;
}
