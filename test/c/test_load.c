/* test_load.c: model folders written here and opened: every element arrives at its place, in the model's dtype, whole
 * and as a rank's share; what does not fit is refused with its name; and the LLAISYS way of filling a model gives the
 * same tokens. */
#include "../../engine/load.h"
#include "../../include/llaisys/models/qwen2.h"
#include "harness.h"
#include "random.h"

#include <ftw.h>
#include <stdlib.h>
#include <unistd.h>

enum { MAX_TENSORS = 64 };

/* A tensor of the folder, stored in its own dtype. */
struct source {
    char name[96];
    size_t rows, cols; /* cols 0: a vector */
    llaisysDataType_t dtype;
    char *data;
};

static struct source sources[MAX_TENSORS];
static size_t nsource;
static char folder[64];

static const struct lla_spec spec = {LLAISYS_DTYPE_BF16, 2, 36, 6, 3, 10, 42, 101, 128, false, 1e-6f, 1e4, {7}, 1};

static size_t numel(const struct source *s) {
    return s->rows * (s->cols ? s->cols : 1);
}

static void add(llaisysDataType_t dtype, size_t rows, size_t cols, const char *name) {
    struct source *s = &sources[nsource++];
    *s = (struct source){.rows = rows, .cols = cols, .dtype = dtype};
    snprintf(s->name, sizeof s->name, "%s", name);
    s->data = malloc(numel(s) * lla_dtype_size(dtype));
    struct rng rng = {nsource};
    const bool is_norm = strstr(name, "norm") != NULL;
    for (size_t i = 0; i < numel(s); i++)
        lla_store_float(s->data, i, is_norm ? 1 + 0.1f * rng_normal(&rng) : 0.4f * rng_normal(&rng), dtype);
}

static void make_sources(llaisysDataType_t dtype, bool tied) {
    const size_t h = spec.hidden, q = spec.nhead * spec.head_dim, kv = spec.nkvhead * spec.head_dim, ffn = spec.ffn;
    nsource = 0;
    add(dtype, spec.vocab, h, "model.embed_tokens.weight");
    for (size_t l = 0; l < spec.nlayer; l++) {
        const struct {
            const char *name;
            size_t rows, cols;
        } list[] = {{"input_layernorm.weight", h, 0},   {"post_attention_layernorm.weight", h, 0},
                    {"self_attn.q_proj.weight", q, h},  {"self_attn.k_proj.weight", kv, h},
                    {"self_attn.v_proj.weight", kv, h}, {"self_attn.o_proj.weight", h, q},
                    {"self_attn.q_proj.bias", q, 0},    {"self_attn.k_proj.bias", kv, 0},
                    {"self_attn.v_proj.bias", kv, 0},   {"mlp.gate_proj.weight", ffn, h},
                    {"mlp.up_proj.weight", ffn, h},     {"mlp.down_proj.weight", h, ffn}};
        for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
            char name[96];
            snprintf(name, sizeof name, "model.layers.%zu.%s", l, list[i].name);
            add(dtype, list[i].rows, list[i].cols, name);
        }
    }
    add(dtype, h, 0, "model.norm.weight");
    if (!tied) add(dtype, spec.vocab, h, "lm_head.weight");
}

static struct source *source(const char *name) {
    for (size_t i = 0; i < nsource; i++)
        if (!strcmp(sources[i].name, name)) return &sources[i];
    HARNESS_FAIL("no source %s", name);
    abort();
}

/* ---- folders ---- */

static void write_text(const char *name, const char *text, size_t n) {
    char path[160];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *out = fopen(path, "wb");
    if (!out || fwrite(text, 1, n, out) != n || fclose(out)) abort();
}

static const char *format_name(llaisysDataType_t dtype) {
    return dtype == LLAISYS_DTYPE_BF16  ? "BF16"
           : dtype == LLAISYS_DTYPE_F16 ? "F16"
           : dtype == LLAISYS_DTYPE_F32 ? "F32"
                                        : "I32";
}

/* Sources [first, last) as one file; `odd` moves the data to odd addresses. */
static void write_shard(const char *name, size_t first, size_t last, bool odd) {
    char *text = NULL, *header = NULL;
    size_t nbytes, nheader, at = 0;
    FILE *h = open_memstream(&header, &nheader), *out = open_memstream(&text, &nbytes);
    fputc('{', h);
    for (size_t i = first; i < last; i++) {
        const struct source *s = &sources[i];
        const size_t size = numel(s) * lla_dtype_size(s->dtype);
        fprintf(h, "%s\"%s\": {\"dtype\": \"%s\", \"shape\": [%zu", i > first ? ", " : "", s->name,
                format_name(s->dtype), s->rows);
        if (s->cols) fprintf(h, ", %zu", s->cols);
        fprintf(h, "], \"data_offsets\": [%zu, %zu]}", at, at + size);
        at += size;
    }
    fputc('}', h);
    fflush(h);
    while ((nheader + 8) % 2 != odd) fputc(' ', h), fflush(h);
    fclose(h);
    for (int i = 0; i < 8; i++) fputc((int)(nheader >> 8 * i & 0xff), out);
    fwrite(header, 1, nheader, out);
    for (size_t i = first; i < last; i++)
        fwrite(sources[i].data, lla_dtype_size(sources[i].dtype), numel(&sources[i]), out);
    fclose(out);
    write_text(name, text, nbytes);
    free(text);
    free(header);
}

static void write_config(const char *dtype, bool tied) {
    char text[1024];
    const int n = snprintf(
        text, sizeof text,
        "{\"architectures\": [\"Qwen2ForCausalLM\"], \"model_type\": \"qwen2\", \"hidden_size\": %zu, "
        "\"num_hidden_layers\": %zu, \"num_attention_heads\": %zu, \"num_key_value_heads\": %zu, "
        "\"head_dim\": %zu, \"intermediate_size\": %zu, \"vocab_size\": %zu, "
        "\"max_position_embeddings\": %zu, \"rms_norm_eps\": 1e-6, \"rope_theta\": 10000.0, "
        "\"hidden_act\": \"silu\", \"eos_token_id\": 7, \"tie_word_embeddings\": %s%s%s%s}",
        spec.hidden, spec.nlayer, spec.nhead, spec.nkvhead, spec.head_dim, spec.ffn, spec.vocab, spec.max_position,
        tied ? "true" : "false", dtype ? ", \"torch_dtype\": \"" : "", dtype ? dtype : "", dtype ? "\"" : "");
    write_text("config.json", text, (size_t)n);
}

static void open_folder(void) {
    snprintf(folder, sizeof folder, "/tmp/test_load_XXXXXX");
    if (!mkdtemp(folder)) abort();
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *at) {
    (void)info, (void)kind, (void)at;
    return remove(path);
}

static void close_folder(void) {
    nftw(folder, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    for (size_t i = 0; i < nsource; i++) free(sources[i].data);
    nsource = 0;
}

/* ---- what arrived ---- */

static void check_handle(llaisysTensor_t t, const char *name, llaisysDataType_t dtype) {
    const struct source *s = source(name);
    size_t shape[2] = {0, 0}, wrong = 0;
    CHECK_INT(tensorGetDataType(t), dtype);
    CHECK_INT(tensorGetNdim(t), s->cols ? 2 : 1);
    tensorGetShape(t, shape);
    CHECK_INT(shape[0], s->rows);
    CHECK_INT(shape[1], s->cols);
    const char *data = tensorGetData(t);
    for (size_t i = 0; i < numel(s); i++) {
        char expected[4];
        lla_store_float(expected, 0, lla_load_float(s->data, i, s->dtype), dtype);
        wrong += memcmp(expected, data + i * lla_dtype_size(dtype), lla_dtype_size(dtype)) != 0;
    }
    if (wrong) HARNESS_FAIL("%s: %zu of %zu elements are wrong", name, wrong, numel(s));
}

static void each_layer_tensor(struct LlaisysQwen2Weights *w, size_t l,
                              void (*visit)(llaisysTensor_t, const char *, llaisysDataType_t),
                              llaisysDataType_t dtype) {
    const struct {
        llaisysTensor_t t;
        const char *name;
    } list[] = {{w->attn_norm_w[l], "input_layernorm.weight"}, {w->mlp_norm_w[l], "post_attention_layernorm.weight"},
                {w->attn_q_w[l], "self_attn.q_proj.weight"},   {w->attn_k_w[l], "self_attn.k_proj.weight"},
                {w->attn_v_w[l], "self_attn.v_proj.weight"},   {w->attn_o_w[l], "self_attn.o_proj.weight"},
                {w->attn_q_b[l], "self_attn.q_proj.bias"},     {w->attn_k_b[l], "self_attn.k_proj.bias"},
                {w->attn_v_b[l], "self_attn.v_proj.bias"},     {w->mlp_gate_w[l], "mlp.gate_proj.weight"},
                {w->mlp_up_w[l], "mlp.up_proj.weight"},        {w->mlp_down_w[l], "mlp.down_proj.weight"}};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.%zu.%s", l, list[i].name);
        visit(list[i].t, name, dtype);
    }
}

static void each_tensor(struct LlaisysQwen2Model *m, bool tied, llaisysDataType_t dtype,
                        void (*visit)(llaisysTensor_t, const char *, llaisysDataType_t)) {
    struct LlaisysQwen2Weights *w = llaisysQwen2ModelWeights(m);
    visit(w->in_embed, "model.embed_tokens.weight", dtype);
    visit(w->out_norm_w, "model.norm.weight", dtype);
    visit(w->out_embed, tied ? "model.embed_tokens.weight" : "lm_head.weight", dtype);
    for (size_t l = 0; l < spec.nlayer; l++) each_layer_tensor(w, l, visit, dtype);
}

static struct LlaisysQwen2Model *opened(llaisysDataType_t dtype) {
    struct LlaisysQwen2Model *m = llaisysQwen2ModelOpen(folder, &(struct LlaisysQwen2Options){.dtype = dtype});
    if (!m) HARNESS_FAIL("%s", llaisysGetLastError());
    return m;
}

TEST(every_pair_of_dtypes) {
    static const llaisysDataType_t dtypes[] = {LLAISYS_DTYPE_BF16, LLAISYS_DTYPE_F16, LLAISYS_DTYPE_F32};
    static const char *const names[] = {"bfloat16", "float16", "float32"};
    for (size_t from = 0; from < 3; from++)
        for (size_t to = 0; to < 4; to++) { /* the last: as the config says */
            const bool tied = (from + to) % 2;
            open_folder();
            make_sources(dtypes[from], tied);
            write_config(names[from], tied);
            write_shard("model.safetensors", 0, nsource, to % 2);
            struct LlaisysQwen2Model *m = opened(to < 3 ? dtypes[to] : LLAISYS_DTYPE_INVALID);
            if (m) each_tensor(m, tied, to < 3 ? dtypes[to] : dtypes[from], check_handle);
            llaisysQwen2ModelDestroy(m);
            close_folder();
        }
}

TEST(shards_of_mixed_dtypes) {
    open_folder();
    make_sources(LLAISYS_DTYPE_F16, false);
    for (size_t i = 0; i < nsource; i++)
        if (i % 3 == 1) {
            struct source *s = &sources[i];
            char *wide = malloc(numel(s) * 4);
            for (size_t j = 0; j < numel(s); j++)
                lla_store_float(wide, j, lla_load_float(s->data, j, s->dtype), LLAISYS_DTYPE_F32);
            free(s->data);
            s->data = wide, s->dtype = LLAISYS_DTYPE_F32;
        }
    write_config(NULL, false); /* says no dtype: that of the embedding */
    write_shard("model-00001-of-00003.safetensors", 0, 5, true);
    write_shard("model-00002-of-00003.safetensors", 5, nsource - 1, false);
    write_shard("model-00003-of-00003.safetensors", nsource - 1, nsource, true);
    struct LlaisysQwen2Model *m = opened(LLAISYS_DTYPE_INVALID);
    if (m) each_tensor(m, false, LLAISYS_DTYPE_F16, check_handle);
    llaisysQwen2ModelDestroy(m);
    close_folder();
}

/* A rank's share of every weight, by the geometry of its plan (test_plan.c has that). */
TEST(ranks) {
    for (size_t degree = 1; degree <= 6; degree++) {
        if (spec.nhead % degree || (spec.nkvhead % degree && degree % spec.nkvhead)) continue;
        for (size_t rank = 0; rank < degree; rank++) {
            struct lla_spec of = spec;
            of.tied = degree == 3;
            struct lla_graph graph;
            struct lla_checkpoint *checkpoint = NULL;
            open_folder();
            make_sources(LLAISYS_DTYPE_F32, of.tied);
            write_shard("model.safetensors", 0, nsource, false);
            CHECK_INT(lla_graph_make(&of, &(struct lla_limits){0}, (struct lla_shard){rank, degree}, &graph), LLA_OK);
            char *arena = calloc(1, graph.plan.total);
            struct lla_runner runner = {.graph = graph, .arena = arena};
            CHECK_INT(lla_checkpoint_open(folder, &checkpoint), LLA_OK);
            CHECK_INT(lla_load_weights(&runner, checkpoint, NULL), LLA_OK);
            size_t wrong = 0;
            for (size_t i = 0; i < graph.plan.nweight; i++) {
                const struct lla_weight *w = &graph.plan.weights[i];
                for (size_t j = 0; j < w->nparts; j++) {
                    const struct lla_weight_part *p = &w->parts[j];
                    const struct source *s = source(p->name);
                    for (size_t r = 0; r < p->rows; r++)
                        for (size_t c = 0; c < p->cols; c++) {
                            const size_t from = (p->row0 + r) * p->full_cols + p->col0 + c;
                            char expected[2];
                            lla_store_float(expected, 0, lla_load_float(s->data, from, s->dtype), LLAISYS_DTYPE_BF16);
                            wrong += memcmp(arena + w->offset + ((p->dst_row + r) * w->cols + c) * 2, expected, 2) != 0;
                        }
                }
            }
            CHECK_INT(wrong, 0);
            for (size_t b = graph.plan.weight_bytes; b < graph.plan.total; b++) wrong += arena[b] != 0;
            CHECK_INT(wrong, 0); /* nothing else is written */
            lla_checkpoint_close(checkpoint);
            lla_graph_free(&graph);
            free(arena);
            close_folder();
        }
    }
}

static size_t last_done, last_total, reports;
static void note(size_t done, size_t total) {
    CHECK(done > last_done && done <= total);
    last_done = done, last_total = total, reports++;
}

TEST(progress) {
    struct lla_graph graph;
    struct lla_checkpoint *checkpoint = NULL;
    open_folder();
    make_sources(LLAISYS_DTYPE_BF16, false);
    write_shard("model.safetensors", 0, nsource, false);
    CHECK_INT(lla_graph_make(&spec, &(struct lla_limits){0}, (struct lla_shard){0, 1}, &graph), LLA_OK);
    char *arena = calloc(1, graph.plan.total);
    struct lla_runner runner = {.graph = graph, .arena = arena};
    CHECK_INT(lla_checkpoint_open(folder, &checkpoint), LLA_OK);
    CHECK_INT(lla_load_weights(&runner, checkpoint, note), LLA_OK);
    CHECK_INT(reports, graph.plan.nweight);
    CHECK_INT(last_total, graph.plan.weight_bytes);
    CHECK(last_total - last_done < graph.plan.nweight * LLA_ALIGN);
    lla_checkpoint_close(checkpoint);
    lla_graph_free(&graph);
    free(arena);
    close_folder();
}

/* ---- what is refused ---- */

static void check_refused(const char *what, const char *more) {
    lla_clear_error();
    struct LlaisysQwen2Model *m = llaisysQwen2ModelOpen(folder, NULL);
    CHECK(!m);
    CHECK_STR_HAS(llaisysGetLastError(), what);
    CHECK_STR_HAS(llaisysGetLastError(), more);
    CHECK_STR_HAS(llaisysGetLastError(), folder);
    llaisysQwen2ModelDestroy(m);
}

TEST(missing_tensors) {
    for (size_t i = 0; i < 1 + 12 + 2; i++) {
        open_folder();
        make_sources(LLAISYS_DTYPE_BF16, false);
        write_config("bfloat16", false);
        const size_t gone = i < 13 ? i : nsource - 15 + i; /* the first layer's and what stands outside */
        char quoted[128];
        snprintf(quoted, sizeof quoted, "tensor '%s' is not in the checkpoint", sources[gone].name);
        snprintf(sources[gone].name, sizeof sources[gone].name, "something.else");
        write_shard("model.safetensors", 0, nsource, false);
        check_refused(quoted, "");
        close_folder();
    }
}

TEST(wrong_shapes_and_dtypes) {
    for (size_t i = 0; i < 13; i++)
        for (int fault = 0; fault < 4; fault++) {
            open_folder();
            make_sources(LLAISYS_DTYPE_BF16, true);
            write_config("bfloat16", true);
            struct source *s = &sources[i];
            char expected[160], found[160];
            const size_t rows = s->rows, cols = s->cols;
            snprintf(expected, sizeof expected,
                     cols ? "tensor '%.90s': config.json asks for shape [%zu, %zu]"
                          : "tensor '%.90s': config.json asks for shape [%zu]",
                     s->name, rows, cols);
            if (fault == 0) { /* transposed, or a matrix of one column */
                s->rows = cols ? cols : rows, s->cols = cols ? rows : 1;
                snprintf(found, sizeof found, "found [%zu, %zu]", s->rows, s->cols);
                if (rows == cols) snprintf(found, sizeof found, "%s", "");
            } else if (fault == 1) { /* one row less */
                s->rows--;
                snprintf(found, sizeof found, cols ? "found [%zu, %zu]" : "found [%zu]", s->rows, s->cols);
            } else if (fault == 2) { /* flat */
                if (cols)
                    s->rows = rows * cols, s->cols = 0;
                else
                    s->rows = rows / 2, s->cols = 2;
                snprintf(found, sizeof found, cols ? "found [%zu]" : "found [%zu, %zu]", s->rows, s->cols);
            } else {
                s->dtype = LLAISYS_DTYPE_I32;
                free(s->data);
                s->data = calloc(numel(s), 4);
                snprintf(expected, sizeof expected, "tensor '%.90s': dtype is i32, expected bf16, f16 or f32", s->name);
                snprintf(found, sizeof found, "model.safetensors");
            }
            write_shard("model.safetensors", 0, nsource, false);
            if (fault || rows != cols) check_refused(expected, found);
            close_folder();
        }
}

TEST(folders) {
    open_folder();
    make_sources(LLAISYS_DTYPE_BF16, true);
    check_refused("config.json", "");
    write_config("bfloat16", true);
    check_refused("model.safetensors", "");
    write_shard("model.safetensors", 0, nsource, false);
    write_config("bfloat16", false);
    check_refused("tensor 'lm_head.weight' is not in the checkpoint", "");
    CHECK(!llaisysQwen2ModelOpen(folder, &(struct LlaisysQwen2Options){.maxseq = 129}));
    CHECK_STR_HAS(llaisysGetLastError(), "max_seq is 129");
    CHECK(!llaisysQwen2ModelOpen(NULL, NULL));
    CHECK(llaisysGetLastError());
    close_folder();
}

TEST(create_needs_a_dtype) {
    struct LlaisysQwen2Meta meta = {LLAISYS_DTYPE_INVALID, 2, 36, 6, 3, 10, 42, 128, 101, 1e-6f, 1e4f, 7};
    struct LlaisysQwen2Model *m = llaisysQwen2ModelCreate(&meta, LLAISYS_DEVICE_CPU, NULL, 1);
    CHECK(!m);
    CHECK_STR_HAS(llaisysGetLastError(), "dtype");
    llaisysQwen2ModelDestroy(m);
    meta.dtype = LLAISYS_DTYPE_I32;
    CHECK(!llaisysQwen2ModelCreate(&meta, LLAISYS_DEVICE_CPU, NULL, 1));
    CHECK_STR_HAS(llaisysGetLastError(), "dtype");
}

/* ---- tokens ---- */

static void load_handle(llaisysTensor_t t, const char *name, llaisysDataType_t dtype) {
    (void)dtype;
    tensorLoad(t, source(name)->data);
}

TEST(filled_by_hand_or_opened) {
    open_folder();
    make_sources(LLAISYS_DTYPE_BF16, false);
    write_config("bfloat16", false);
    write_shard("model.safetensors", 0, nsource, false);
    const struct LlaisysQwen2Meta meta = {LLAISYS_DTYPE_BF16, 2, 36, 6, 3, 10, 42, 128, 101, 1e-6f, 1e4f, 7};
    struct LlaisysQwen2Model *a = opened(LLAISYS_DTYPE_INVALID);
    struct LlaisysQwen2Model *b = llaisysQwen2ModelCreate(&meta, LLAISYS_DEVICE_CPU, NULL, 1);
    CHECK(a && b);
    if (!a || !b) return;
    each_tensor(b, false, LLAISYS_DTYPE_BF16, load_handle);
    each_tensor(b, false, LLAISYS_DTYPE_BF16, check_handle);
    int64_t prompt[40], x, y;
    float logits[2][101];
    struct rng rng = {8};
    for (size_t i = 0; i < 40; i++) prompt[i] = (int64_t)rng_below(&rng, 101);
    x = llaisysQwen2ModelInfer(a, prompt, 40);
    y = llaisysQwen2ModelInfer(b, prompt, 40);
    for (int step = 0; step < 60; step++) {
        CHECK(x >= 0);
        CHECK_INT(x, y);
        CHECK_INT(llaisysQwen2ModelLogits(a, logits[0]), 0);
        CHECK_INT(llaisysQwen2ModelLogits(b, logits[1]), 0);
        CHECK(!memcmp(logits[0], logits[1], sizeof *logits));
        x = llaisysQwen2ModelInfer(a, &x, 1);
        y = llaisysQwen2ModelInfer(b, &y, 1);
    }
    CHECK(llaisysQwen2ModelIsEnd(a, 7) && llaisysQwen2ModelIsEnd(b, 7) && !llaisysQwen2ModelIsEnd(a, 8));
    llaisysQwen2ModelDestroy(a);
    llaisysQwen2ModelDestroy(b);
    close_folder();
}

RUN_TESTS()
