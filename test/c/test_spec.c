/* test_spec.c: configs that are taken, and what is said of each that is not. */
#include "../../planner/spec.h"
#include "harness.h"

#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* What a config must have; "%s" takes more, each piece ending with a comma. */
#define CONFIG                                                                                                         \
    "{%s\"model_type\":\"qwen2\",\"hidden_size\":64,\"num_hidden_layers\":2,\"num_attention_heads\":4,"                \
    "\"intermediate_size\":128,\"vocab_size\":1000}"

static lla_status parse_n(const char *text, size_t n, struct lla_spec *spec) {
    char *exact = malloc(n + !n); /* exactly sized, so that the address sanitizer sees a read beyond the end */
    memcpy(exact, text, n);
    lla_clear_error();
    memset(spec, 0xff, sizeof *spec);
    lla_status status = lla_spec_parse(exact, n, "config.json", spec);
    free(exact);
    return status;
}

static lla_status parse_text(const char *text, struct lla_spec *spec) {
    return parse_n(text, strlen(text), spec);
}

static lla_status parse_more(const char *more, struct lla_spec *spec) {
    char text[4096];
    snprintf(text, sizeof text, CONFIG, more);
    return parse_text(text, spec);
}

/* CONFIG with the first `from` replaced. */
static lla_status parse_replaced(const char *from, const char *to, struct lla_spec *spec) {
    char whole[1024], text[1024];
    snprintf(whole, sizeof whole, CONFIG, "");
    char *at = strstr(whole, from);
    if (!at) abort();
    snprintf(text, sizeof text, "%.*s%s%s", (int)(at - whole), whole, to, at + strlen(from));
    return parse_text(text, spec);
}

static void refused(lla_status status, int line, const struct lla_spec *spec, const char *const *needles) {
    const char *error = lla_last_error();
    if (!status) fprintf(stderr, "line %d: accepted\n", line);
    CHECK(status != LLA_OK);
    CHECK_INT(spec->hidden, 0); /* nothing is left behind */
    CHECK_STR_HAS(error, "config.json: ");
    for (; *needles; needles++) {
        if (!error || !strstr(error, *needles)) fprintf(stderr, "line %d:\n", line);
        CHECK_STR_HAS(error, *needles);
    }
}

#define REFUSED(call, ...)                                                                                             \
    do {                                                                                                               \
        struct lla_spec spec_;                                                                                         \
        lla_status status_ = call;                                                                                     \
        refused(status_, __LINE__, &spec_, (const char *const[]){__VA_ARGS__, NULL});                                  \
    } while (0)
#define REFUSED_TEXT(text, ...) REFUSED(parse_text(text, &spec_), __VA_ARGS__)
#define REFUSED_MORE(more, ...) REFUSED(parse_more(more, &spec_), __VA_ARGS__)
#define REFUSED_REPLACED(from, to, ...) REFUSED(parse_replaced(from, to, &spec_), __VA_ARGS__)

static struct lla_spec accepted(const char *more) {
    struct lla_spec spec;
    lla_status status = parse_more(more, &spec);
    if (status) fprintf(stderr, "refused: %s\n", lla_last_error());
    CHECK_INT(status, LLA_OK);
    return spec;
}

TEST(defaults) {
    struct lla_spec spec = accepted("");
    CHECK_INT(spec.dtype, LLAISYS_DTYPE_INVALID);
    CHECK_INT(spec.hidden, 64);
    CHECK_INT(spec.nlayer, 2);
    CHECK_INT(spec.nhead, 4);
    CHECK_INT(spec.nkvhead, 4);
    CHECK_INT(spec.head_dim, 16);
    CHECK_INT(spec.ffn, 128);
    CHECK_INT(spec.vocab, 1000);
    CHECK_INT(spec.max_position, 32768);
    CHECK(!spec.tied);
    CHECK(spec.eps == 1e-6f);
    CHECK(spec.theta == 10000);
    CHECK_INT(spec.neos, 0);
    spec = accepted("\"num_key_value_heads\":null,\"head_dim\":null,\"rope_scaling\":null,\"rope_parameters\":null,"
                    "\"eos_token_id\":null,\"torch_dtype\":null,\"layer_types\":null,\"quantization_config\":null,"
                    "\"rms_norm_eps\":null,\"tie_word_embeddings\":null,\"hidden_act\":null,");
    CHECK_INT(spec.nkvhead, 4);
    CHECK_INT(spec.head_dim, 16);
}

TEST(as_transformers_4_writes) {
    static const char text[] =
        "{\n  \"architectures\": [\n    \"Qwen2ForCausalLM\"\n  ],\n  \"attention_dropout\": 0.0,\n  \"bos_token_id\": "
        "151643,\n"
        "  \"eos_token_id\": 151643,\n  \"hidden_act\": \"silu\",\n  \"hidden_size\": 1536,\n  \"initializer_range\": "
        "0.02,\n"
        "  \"intermediate_size\": 8960,\n  \"max_position_embeddings\": 131072,\n  \"max_window_layers\": 21,\n"
        "  \"model_type\": \"qwen2\",\n  \"num_attention_heads\": 12,\n  \"num_hidden_layers\": 28,\n"
        "  \"num_key_value_heads\": 2,\n  \"rms_norm_eps\": 1e-06,\n  \"rope_theta\": 10000,\n  \"sliding_window\": "
        "4096,\n"
        "  \"tie_word_embeddings\": false,\n  \"torch_dtype\": \"bfloat16\",\n  \"transformers_version\": \"4.44.0\",\n"
        "  \"use_cache\": true,\n  \"use_mrope\": false,\n  \"use_sliding_window\": false,\n  \"vocab_size\": "
        "151936\n}\n";
    struct lla_spec spec;
    CHECK_INT(parse_text(text, &spec), LLA_OK);
    CHECK_INT(spec.dtype, LLAISYS_DTYPE_BF16);
    CHECK_INT(spec.nkvhead, 2);
    CHECK_INT(spec.head_dim, 128);
    CHECK_INT(spec.max_position, 131072);
    CHECK_INT(spec.neos, 1);
    CHECK_INT(spec.eos[0], 151643);
    for (size_t n = 0; n < sizeof text - 3; n++) /* every truncation */
        REFUSED(parse_n(text, n, &spec_), "malformed JSON", "expected");
}

TEST(as_transformers_5_writes) {
    struct lla_spec spec = accepted(
        "\"dtype\":\"bfloat16\",\"head_dim\":32,\"rope_parameters\":{\"rope_theta\":1000000.0,\"rope_type\":"
        "\"default\"},"
        "\"layer_types\":[\"full_attention\",\"full_attention\"],\"sliding_window\":null,\"tie_word_embeddings\":true,"
        "\"eos_token_id\":[7,8,7],\"num_key_value_heads\":2,");
    CHECK_INT(spec.dtype, LLAISYS_DTYPE_BF16);
    CHECK_INT(spec.head_dim, 32);
    CHECK(spec.theta == 1e6);
    CHECK(spec.tied);
    CHECK_INT(spec.neos, 2);
    CHECK(spec.eos[0] == 7 && spec.eos[1] == 8);
}

TEST(text) {
    static char deep[20001];
    memset(deep, '[', sizeof deep - 1);
    REFUSED_TEXT("", "malformed JSON", "the end of the text");
    REFUSED_TEXT("{\n\"a\":\n", "malformed JSON at line 3");
    REFUSED_TEXT("[1]", "expected a JSON object, found an array");
    REFUSED_TEXT("{\"\xff\":1}", "not UTF-8");
    REFUSED_TEXT(deep, "nested more than 64 levels deep");
    REFUSED_TEXT("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "git lfs pull");
    REFUSED_MORE("\"hidden_size\":64,", "duplicate key 'hidden_size'");
    REFUSED_MORE("\"x\":{\"y\":1,\"y\":1},", "'x': duplicate key 'y'");
}

TEST(architecture) {
    REFUSED_TEXT("{}", "model_type: expected \"qwen2\"", "found nothing");
    REFUSED_REPLACED("\"qwen2\"", "\"llama\"", "model_type: expected \"qwen2\"", "found \"llama\"");
    REFUSED_REPLACED("\"qwen2\"", "2", "model_type", "found 2");
    REFUSED_MORE("\"hidden_act\":\"gelu\",", "hidden_act: expected \"silu\", found \"gelu\"");
    REFUSED_MORE("\"hidden_act\":1,", "hidden_act: expected \"silu\", found 1");
    REFUSED_MORE("\"quantization_config\":{\"quant_method\":\"awq\"},", "quantization_config: expected none",
                 "found \"awq\"");
    REFUSED_MORE("\"quantization_config\":{},", "quantization_config: expected none", "found an object");
    accepted("\"hidden_act\":\"silu\",");
}

TEST(integers) {
    static const char *const keys[] = {
        "hidden_size",         "num_hidden_layers", "num_attention_heads",    "intermediate_size", "vocab_size",
        "num_key_value_heads", "head_dim",          "max_position_embeddings"};
    static const struct {
        const char *value, *found;
    } cases[] = {{"-1", "found -1"},
                 {"1.5", "found 1.5"},
                 {"\"64\"", "found \"64\""},
                 {"true", "found true"},
                 {"1e400", "found inf"},
                 {"2147483649", "found 2147483649"},
                 {"18446744073709551616", "found 1.8446744073709"},
                 {"[64]", "found an array"},
                 {"{}", "found an object"},
                 {"0", "found 0"},
                 {"2147483648", "found 2147483648"}};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        for (size_t j = 0; j < sizeof cases / sizeof *cases; j++) {
            char whole[1024], text[1024], key[64], needle[64];
            snprintf(whole, sizeof whole, CONFIG,
                     "\"num_key_value_heads\":4,\"head_dim\":16,\"max_position_embeddings\":32,");
            snprintf(key, sizeof key, "\"%s\":", keys[i]);
            const char *at = strstr(whole, key) + strlen(key), *rest = at + strcspn(at, ",}");
            snprintf(text, sizeof text, "%.*s%s%s", (int)(at - whole), whole, cases[j].value, rest);
            snprintf(needle, sizeof needle, "config.json: %s: expected ", keys[i]);
            REFUSED_TEXT(text, needle, cases[j].found);
        }
    for (size_t i = 0; i < 5; i++) { /* the five that have no default */
        char from[64], needle[64];
        snprintf(from, sizeof from, "\"%s\"", keys[i]);
        snprintf(needle, sizeof needle, "%s: expected a whole number, found no such key", keys[i]);
        REFUSED_REPLACED(from, "\"other\"", needle);
    }
    REFUSED_REPLACED("\"hidden_size\":64", "\"hidden_size\":null", "hidden_size: expected a whole number, found null");
}

TEST(dimensions_that_disagree) {
    REFUSED_MORE("\"num_key_value_heads\":3,",
                 "num_attention_heads: expected a multiple of num_key_value_heads, 3, found 4");
    REFUSED_MORE("\"num_key_value_heads\":8,",
                 "num_attention_heads: expected a multiple of num_key_value_heads, 8, found 4");
    REFUSED_MORE("\"head_dim\":15,", "head_dim: expected an even number", "found 15");
    REFUSED_MORE("\"head_dim\":1026,", "head_dim: expected 1 to 1024, found 1026");
    REFUSED_REPLACED("\"hidden_size\":64", "\"hidden_size\":66",
                     "hidden_size: expected a multiple of num_attention_heads, 4", "found 66");
    REFUSED_REPLACED("\"hidden_size\":64", "\"hidden_size\":60", "head_dim: expected an even number", "found 15");
    REFUSED_REPLACED("\"num_attention_heads\":4", "\"num_attention_heads\":4096,\"head_dim\":512",
                     "num_attention_heads * head_dim: expected at most 1048576, found 2097152");
}

TEST(numbers) {
    REFUSED_MORE("\"rms_norm_eps\":0,", "rms_norm_eps: expected more than 0", "found 0");
    REFUSED_MORE("\"rms_norm_eps\":-1e300,", "rms_norm_eps: expected more than 0", "found -1e+300");
    REFUSED_MORE("\"rms_norm_eps\":1e-60,", "rms_norm_eps: expected more than 0"); /* 0 as f32 */
    REFUSED_MORE("\"rms_norm_eps\":2,", "rms_norm_eps: expected more than 0 and at most 1, found 2");
    REFUSED_MORE("\"rms_norm_eps\":1e999,", "rms_norm_eps: expected a finite number, found inf");
    REFUSED_MORE("\"rms_norm_eps\":\"1e-6\",", "rms_norm_eps: expected a finite number, found \"1e-6\"");
    REFUSED_MORE("\"rope_theta\":0,", "rope_theta: expected a finite number above 0, found 0");
    REFUSED_MORE("\"rope_theta\":-1e4,", "rope_theta: expected a finite number above 0, found -10000");
    REFUSED_MORE("\"rope_theta\":1e999,", "rope_theta: expected a finite number, found inf");
    REFUSED_MORE("\"rope_theta\":[],", "rope_theta: expected a finite number, found an array");
    CHECK(accepted("\"rms_norm_eps\":0.00001,\"rope_theta\":1e6,").theta == 1e6);
    CHECK(accepted("\"rms_norm_eps\":0.00001,").eps == 0.00001f);
    if (setlocale(LC_NUMERIC, "de_DE.UTF-8")) CHECK(accepted("\"rms_norm_eps\":0.00001,").eps == 0.00001f);
    setlocale(LC_NUMERIC, "C");
}

TEST(booleans) {
    CHECK(accepted("\"tie_word_embeddings\":true,").tied);
    REFUSED_MORE("\"tie_word_embeddings\":1,", "tie_word_embeddings: expected true or false, found 1");
    REFUSED_MORE("\"use_sliding_window\":\"no\",", "use_sliding_window: expected true or false, found \"no\"");
}

TEST(dtypes) {
    CHECK_INT(accepted("\"torch_dtype\":\"float16\",").dtype, LLAISYS_DTYPE_F16);
    CHECK_INT(accepted("\"dtype\":\"float32\",").dtype, LLAISYS_DTYPE_F32);
    CHECK_INT(accepted("\"dtype\":null,\"torch_dtype\":\"bfloat16\",").dtype, LLAISYS_DTYPE_BF16);
    CHECK_INT(accepted("\"dtype\":\"bfloat16\",\"torch_dtype\":\"bfloat16\",").dtype, LLAISYS_DTYPE_BF16);
    REFUSED_MORE("\"torch_dtype\":\"int8\",",
                 "torch_dtype: expected \"bfloat16\", \"float16\" or \"float32\", found \"int8\"");
    REFUSED_MORE("\"dtype\":16,", "dtype: expected", "found 16");
    REFUSED_MORE("\"dtype\":\"\",", "dtype: expected", "found \"\"");
    REFUSED_MORE("\"dtype\":\"bfloat16\",\"torch_dtype\":\"float16\",",
                 "torch_dtype: expected what dtype says, bf16, found f16");
}

TEST(rope) {
    CHECK(accepted("\"rope_theta\":1e6,\"rope_scaling\":{\"type\":\"default\"},").theta == 1e6);
    CHECK(accepted("\"rope_parameters\":{},").theta == 10000);
    CHECK(accepted("\"rope_theta\":5e5,\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":500000},").theta ==
          5e5);
    REFUSED_MORE("\"rope_theta\":1e6,\"rope_parameters\":{\"rope_theta\":500000},",
                 "rope_parameters: rope_theta: expected 1000000, as elsewhere in the file, found 500000");
    REFUSED_MORE("\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4.0},", "rope_scaling: type: expected \"default\"",
                 "found \"yarn\"");
    REFUSED_MORE("\"rope_scaling\":{\"type\":\"default\",\"rope_type\":\"linear\"},", "rope_scaling: rope_type",
                 "found \"linear\"");
    REFUSED_MORE("\"rope_parameters\":{\"rope_type\":\"llama3\"},", "rope_parameters: rope_type", "found \"llama3\"");
    REFUSED_MORE("\"rope_parameters\":{\"rope_type\":3},", "rope_parameters: rope_type", "found 3");
    REFUSED_MORE("\"rope_scaling\":{\"factor\":4.0},", "rope_scaling: expected rope_type \"default\"",
                 "found a factor");
    REFUSED_MORE("\"rope_parameters\":{\"full_attention\":{\"rope_type\":\"yarn\"}},", "rope_parameters",
                 "'full_attention'");
    REFUSED_MORE("\"rope_scaling\":\"yarn\",", "rope_scaling: expected an object or null, found \"yarn\"");
    REFUSED_MORE("\"rope_parameters\":{\"rope_theta\":\"1e6\"},",
                 "rope_theta: expected a finite number, found \"1e6\"");
    REFUSED_MORE("\"rope_parameters\":{\"rope_theta\":-1},", "rope_theta: expected a finite number above 0, found -1");
}

TEST(sliding_window) {
    accepted("\"use_sliding_window\":false,\"sliding_window\":16,\"max_window_layers\":0,");
    accepted("\"use_sliding_window\":true,\"sliding_window\":null,\"max_window_layers\":0,");
    accepted("\"use_sliding_window\":true,\"sliding_window\":16,\"max_window_layers\":2,");
    accepted("\"use_sliding_window\":true,\"sliding_window\":16,"); /* max_window_layers 28 by default */
    accepted(
        "\"use_sliding_window\":true,\"sliding_window\":512,\"max_window_layers\":0,\"max_position_embeddings\":512,");
    accepted("\"use_sliding_window\":true,\"sliding_window\":16,\"max_window_layers\":0,"
             "\"layer_types\":[\"full_attention\",\"full_attention\"],");
    REFUSED_MORE("\"use_sliding_window\":true,\"sliding_window\":16,\"max_window_layers\":1,",
                 "use_sliding_window: expected false", "a window of 16 tokens from layer 1 of 2 on");
    REFUSED_MORE("\"use_sliding_window\":true,\"max_window_layers\":0,", "a window of 4096 tokens");
    REFUSED_MORE("\"sliding_window\":-1,", "sliding_window: expected a whole number", "found -1");
    REFUSED_MORE("\"max_window_layers\":1.5,", "max_window_layers: expected a whole number", "found 1.5");
    REFUSED_MORE("\"layer_types\":[\"full_attention\",\"sliding_attention\"],",
                 "layer_types: expected only \"full_attention\", found \"sliding_attention\" for layer 1");
    REFUSED_MORE("\"layer_types\":[\"full_attention\",null],", "layer_types", "found null for layer 1");
    REFUSED_MORE("\"layer_types\":[\"full_attention\"],", "layer_types: expected 2 entries", "found 1");
    REFUSED_MORE("\"layer_types\":{},", "layer_types: expected an array, found an object");
}

TEST(end_tokens) {
    CHECK_INT(accepted("\"eos_token_id\":999,").eos[0], 999);
    CHECK_INT(accepted("\"eos_token_id\":0,").neos, 1);
    CHECK_INT(accepted("\"eos_token_id\":[],").neos, 0);
    CHECK_INT(accepted("\"eos_token_id\":[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,15,0],").neos, 16);
    REFUSED_MORE("\"eos_token_id\":[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16],", "eos_token_id: expected at most 16");
    REFUSED_MORE("\"eos_token_id\":1000,", "eos_token_id: expected a whole number from 0 to 999", "found 1000");
    REFUSED_MORE("\"eos_token_id\":-1,", "eos_token_id", "found -1");
    REFUSED_MORE("\"eos_token_id\":[1,1.5],", "eos_token_id", "found 1.5");
    REFUSED_MORE("\"eos_token_id\":[1,null],", "eos_token_id", "found null");
    REFUSED_MORE("\"eos_token_id\":[[1]],", "eos_token_id", "found an array");
    REFUSED_MORE("\"eos_token_id\":\"</s>\",", "eos_token_id", "found \"</s>\"");
}

static lla_status parse_generation(const char *text, struct lla_spec *spec) {
    lla_clear_error();
    return lla_spec_parse_generation(text, strlen(text), "generation_config.json", spec);
}

TEST(generation) {
    struct lla_spec spec = accepted("\"eos_token_id\":5,"), before = spec;
    CHECK_INT(parse_generation("{\"temperature\":0.6,\"do_sample\":true}", &spec), LLA_OK);
    CHECK_INT(spec.neos, 1);
    CHECK_INT(parse_generation("{\"eos_token_id\":null}", &spec), LLA_OK);
    CHECK_INT(parse_generation("{\"eos_token_id\":5}", &spec), LLA_OK);
    CHECK_INT(spec.neos, 1);
    CHECK_INT(parse_generation("{\"eos_token_id\":[6,5]}", &spec), LLA_OK);
    CHECK_INT(spec.neos, 2);
    CHECK_INT(spec.eos[1], 6);

    static const struct {
        const char *text, *needle;
    } cases[] = {{"", "malformed JSON"},
                 {"[]", "expected a JSON object, found an array"},
                 {"{\"eos_token_id\":[6,1000]}",
                  "eos_token_id: expected a whole number from 0 to 999, below vocab_size, found 1000"},
                 {"{\"eos_token_id\":1,\"eos_token_id\":2}", "duplicate key 'eos_token_id'"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        spec = before;
        CHECK(parse_generation(cases[i].text, &spec) != LLA_OK);
        CHECK_STR_HAS(lla_last_error(), "generation_config.json: ");
        CHECK_STR_HAS(lla_last_error(), cases[i].needle);
        CHECK_INT(spec.neos, 1); /* a failure adds nothing */
    }
    memset(&spec, 0, sizeof spec);
    CHECK(parse_generation("{\"eos_token_id\":1}", &spec) != LLA_OK);
}

TEST(check) {
    const struct lla_spec good = accepted("\"eos_token_id\":5,");
    struct lla_spec spec;
#define REFUSED_FIELD(field, value, needle)                                                                            \
    do {                                                                                                               \
        spec = good;                                                                                                   \
        spec.field = value;                                                                                            \
        CHECK_INT(lla_spec_check(&spec), LLA_EINVAL);                                                                  \
        CHECK_STR_HAS(lla_last_error(), needle);                                                                       \
    } while (0)
    CHECK_INT(lla_spec_check(&good), LLA_OK);
    REFUSED_FIELD(hidden, 0, "hidden_size: expected 1 to 1048576, found 0");
    REFUSED_FIELD(hidden, SIZE_MAX, "hidden_size");
    REFUSED_FIELD(nlayer, 0, "num_hidden_layers");
    REFUSED_FIELD(nlayer, 4097, "num_hidden_layers: expected 1 to 4096, found 4097");
    REFUSED_FIELD(nhead, 0, "num_attention_heads");
    REFUSED_FIELD(nhead, 5, "num_attention_heads: expected a multiple");
    REFUSED_FIELD(nkvhead, 0, "num_key_value_heads");
    REFUSED_FIELD(head_dim, 0, "head_dim");
    REFUSED_FIELD(head_dim, 3, "head_dim: expected an even number");
    REFUSED_FIELD(ffn, 0, "intermediate_size");
    REFUSED_FIELD(ffn, ((size_t)1 << 22) + 1, "intermediate_size");
    REFUSED_FIELD(vocab, 0, "vocab_size");
    REFUSED_FIELD(vocab, ((size_t)1 << 24) + 1, "vocab_size");
    REFUSED_FIELD(max_position, 0, "max_position_embeddings");
    REFUSED_FIELD(max_position, SIZE_MAX, "max_position_embeddings");
    REFUSED_FIELD(dtype, LLAISYS_DTYPE_I8, "dtype: expected bf16, f16 or f32, found i8");
    REFUSED_FIELD(dtype, (llaisysDataType_t)77, "dtype");
    REFUSED_FIELD(eps, 0, "rms_norm_eps");
    REFUSED_FIELD(eps, NAN, "rms_norm_eps");
    REFUSED_FIELD(theta, 0, "rope_theta");
    REFUSED_FIELD(theta, NAN, "rope_theta");
    REFUSED_FIELD(theta, INFINITY, "rope_theta");
    REFUSED_FIELD(neos, LLA_MAX_EOS + 1, "eos_token_id");
    REFUSED_FIELD(eos[0], -1, "eos_token_id: expected 0 to 999");
    REFUSED_FIELD(eos[0], 1000, "eos_token_id");
}

/* ---- folders ---- */

static char folder[64];

static void put(const char *name, const char *text) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (!file) abort();
    fputs(text, file);
    fclose(file);
}

static void drop(const char *name) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    CHECK_INT(remove(path), 0);
}

TEST(load) {
    struct lla_spec spec;
    char text[512], path[128];
    strcpy(folder, "/tmp/refrain-test-XXXXXX");
    if (!mkdtemp(folder)) abort();
    CHECK(lla_spec_load(folder, &spec) != LLA_OK);
    CHECK_STR_HAS(lla_last_error(), "config.json: expected in model folder");
    CHECK_STR_HAS(lla_last_error(), folder);

    snprintf(text, sizeof text, CONFIG, "\"eos_token_id\":5,");
    put("config.json", text);
    CHECK_INT(lla_spec_load(folder, &spec), LLA_OK);
    CHECK_INT(spec.neos, 1);
    put("generation_config.json", "{\"eos_token_id\":[5,6]}");
    CHECK_INT(lla_spec_load(folder, &spec), LLA_OK);
    CHECK_INT(spec.neos, 2);
    put("generation_config.json", "{\"eos_token_id\":-5}");
    CHECK(lla_spec_load(folder, &spec) != LLA_OK);
    CHECK_STR_HAS(lla_last_error(), "generation_config.json: eos_token_id");
    CHECK_INT(spec.hidden, 0);
    drop("generation_config.json");

    snprintf(path, sizeof path, "%s/config.json", folder);
    CHECK_INT(truncate(path, (16 << 20) + 1), 0);
    CHECK(lla_spec_load(folder, &spec) != LLA_OK);
    CHECK_STR_HAS(lla_last_error(), "config.json: expected at most 16777216 bytes, found 16777217");
    CHECK_INT(truncate(path, 0), 0);
    CHECK(lla_spec_load(folder, &spec) != LLA_OK);
    CHECK_STR_HAS(lla_last_error(), "config.json: malformed JSON");
    drop("config.json");
    CHECK_INT(rmdir(folder), 0);
    CHECK(lla_spec_load(folder, &spec) != LLA_OK);
    CHECK_STR_HAS(lla_last_error(), folder);
}

RUN_TESTS()
