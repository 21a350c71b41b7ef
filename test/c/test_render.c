/* test_render.c: the plan's table, JSON and picture over models from tiny to large. The plans are laid out here, not by
 * the planner, so that a fault of one does not hide the other's. */
#include "../../planner/plan.h"
#include "harness.h"

#include <cJSON.h>
#include <locale.h>
#include <stdlib.h>

enum { MAX_ACTIVATIONS = 16, MAX_REGIONS = 1024 };

struct shape {
    const char *label;
    struct lla_spec spec;
    struct lla_limits limits;
    struct lla_shard shard;
};

static const struct shape shapes[] = {
    {"1.5B",
     {LLAISYS_DTYPE_BF16, 28, 1536, 12, 2, 128, 8960, 151936, 131072, false, 1e-6f, 10000, {151643}, 1},
     {.max_seq = 4096, .max_seqs = 16, .kv_tokens = 65536, .kv_block = 16, .prefill_chunk = 512},
     {0, 1}},
    {"tiny",
     {LLAISYS_DTYPE_F32, 2, 64, 4, 2, 16, 128, 1000, 512, true, 1e-6f, 10000, {1, 2}, 2},
     {.max_seq = 128, .max_seqs = 2, .kv_tokens = 256, .kv_block = 16, .prefill_chunk = 32},
     {0, 1}},
    {"0.5B, tied",
     {LLAISYS_DTYPE_BF16, 24, 896, 14, 2, 64, 4864, 151936, 32768, true, 1e-6f, 1e6, {151645, 151643}, 2},
     {.max_seq = 2048, .max_seqs = 8, .kv_tokens = 16384, .kv_block = 16, .prefill_chunk = 256},
     {0, 1}},
    {"7B",
     {LLAISYS_DTYPE_BF16, 28, 3584, 28, 4, 128, 18944, 152064, 131072, false, 1e-6f, 10000, {151643}, 1},
     {.max_seq = 32768, .max_seqs = 64, .kv_tokens = 262144, .kv_block = 16, .prefill_chunk = 2048},
     {0, 1}},
    {"32B, rank 1 of 2",
     {LLAISYS_DTYPE_BF16, 64, 5120, 40, 8, 128, 27648, 152064, 131072, false, 1e-5f, 1e6, {151643}, 1},
     {.max_seq = 8192, .max_seqs = 32, .kv_tokens = 131072, .kv_block = 16, .prefill_chunk = 1024},
     {1, 2}},
};
enum { NSHAPE = sizeof shapes / sizeof *shapes };

static const char *const nodes[] = {"embed", "qkv", "attention", "o", "gate_up", "down", "head", "sample"};
enum { EMBED, QKV, ATTENTION, O, GATE_UP, DOWN, HEAD, SAMPLE, NNODE };

static size_t aligned(size_t n) {
    return (n + LLA_ALIGN - 1) / LLA_ALIGN * LLA_ALIGN;
}

static struct lla_region *add(struct lla_plan *plan, enum lla_region_kind kind, const char *name, const char *shape,
                              size_t nbytes) {
    struct lla_region *r = &plan->regions[plan->nregion++];
    *r = (struct lla_region){.kind = kind, .offset = plan->total, .nbytes = nbytes, .last = NNODE - 1};
    snprintf(r->name, sizeof r->name, "%s", name);
    snprintf(r->shape, sizeof r->shape, "%s", shape);
    plan->total += aligned(nbytes);
    return r;
}

static void add_weight(struct lla_plan *plan, enum lla_weight_kind kind, const char *name, size_t layer, size_t rows,
                       size_t cols) {
    const char *dtype = lla_dtype_name(plan->spec.dtype);
    char full[LLA_NAME], shape[LLA_NAME];
    bool in_layer = kind != LLA_W_EMBED && kind != LLA_W_NORM && kind != LLA_W_HEAD;
    struct lla_weight *w = &plan->weights[plan->nweight++];
    *w = (struct lla_weight){.kind = kind, .layer = layer, .rows = rows, .cols = cols, .nparts = 1};
    w->nbytes = rows * cols * lla_dtype_size(plan->spec.dtype);
    snprintf(w->parts[0].name, LLA_NAME, "model.%s.%zu.weight", name, layer);
    w->parts[0].rows = rows, w->parts[0].cols = cols;
    if (kind == LLA_W_HEAD && plan->spec.tied) {
        w->offset = plan->weights[0].offset;
        return;
    }
    snprintf(full, sizeof full, in_layer ? "%s.%zu" : "%s", name, layer);
    if (cols > 1)
        snprintf(shape, sizeof shape, "[%zu, %zu] %s", rows, cols, dtype);
    else
        snprintf(shape, sizeof shape, "[%zu] %s", rows, dtype);
    w->offset = add(plan, LLA_R_WEIGHT, full, shape, w->nbytes)->offset;
    plan->weight_bytes += w->nbytes;
}

static void add_step(struct lla_plan *plan, const char *name, size_t rows, size_t cols, const char *dtype) {
    char shape[LLA_NAME];
    if (cols > 1)
        snprintf(shape, sizeof shape, "[%zu, %zu] %s", rows, cols, dtype);
    else
        snprintf(shape, sizeof shape, "[%zu] %s", rows, dtype);
    add(plan, LLA_R_STEP, name, shape, rows * cols * 4);
}

static int by_size(const void *a, const void *b) {
    const struct lla_region *x = a, *y = b;
    return (x->nbytes < y->nbytes) - (x->nbytes > y->nbytes);
}

static int by_offset(const void *a, const void *b) {
    const struct lla_region *x = a, *y = b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Each to the lowest offset where nothing that lives with it lies, large ones first. */
static void place(struct lla_plan *plan, struct lla_region *r, size_t n) {
    qsort(r, n, sizeof *r, by_size);
    size_t top = 0;
    for (size_t i = 0; i < n; i++) {
        size_t at = 0;
        for (size_t k = 0; k < i; k++) {
            bool meets = r[k].first <= r[i].last && r[i].first <= r[k].last;
            if (meets && r[k].offset < at + r[i].nbytes && at < r[k].offset + r[k].nbytes) {
                at = aligned(r[k].offset + r[k].nbytes);
                k = (size_t)-1; /* look at all of them again */
            }
        }
        r[i].offset = at;
        if (at + r[i].nbytes > top) top = at + r[i].nbytes;
        plan->activation_sum += r[i].nbytes;
    }
    qsort(r, n, sizeof *r, by_offset);
    for (size_t i = 0; i < n; i++) r[i].offset += plan->total;
    plan->activation_bytes = top;
    plan->total += aligned(top);
    plan->nregion += n;
}

static void make(const struct shape *s, struct lla_plan *plan) {
    const struct lla_spec *m = &s->spec;
    *plan = (struct lla_plan){.spec = *m, .limits = s->limits, .shard = s->shard, .max_rows = s->limits.prefill_chunk};
    plan->nhead = m->nhead / s->shard.degree, plan->nkvhead = m->nkvhead / s->shard.degree;
    plan->kvhead0 = s->shard.rank * plan->nkvhead, plan->ffn = m->ffn / s->shard.degree;
    plan->vocab = m->vocab / s->shard.degree, plan->vocab0 = s->shard.rank * plan->vocab;
    plan->max_blocks = s->limits.max_seq / s->limits.kv_block;
    plan->nblock = s->limits.kv_tokens / s->limits.kv_block + 1;
    plan->weights = calloc(8 * m->nlayer + 3, sizeof *plan->weights);
    plan->regions = calloc(MAX_REGIONS, sizeof *plan->regions);
    plan->nnode = NNODE, plan->node_names = nodes;
    plan->repeat_first = QKV, plan->repeat_last = DOWN, plan->repeat = m->nlayer;

    size_t q = plan->nhead * m->head_dim, kv = plan->nkvhead * m->head_dim, rows = plan->max_rows;
    add_weight(plan, LLA_W_EMBED, "embed", 0, m->vocab, m->hidden);
    for (size_t l = 0; l < m->nlayer; l++) {
        add_weight(plan, LLA_W_ATTN_NORM, "attn_norm", l, m->hidden, 1);
        add_weight(plan, LLA_W_QKV, "qkv", l, q + 2 * kv, m->hidden);
        add_weight(plan, LLA_W_QKV_BIAS, "qkv_bias", l, q + 2 * kv, 1);
        add_weight(plan, LLA_W_O, "o", l, m->hidden, q);
        add_weight(plan, LLA_W_MLP_NORM, "mlp_norm", l, m->hidden, 1);
        add_weight(plan, LLA_W_GATE_UP, "gate_up", l, 2 * plan->ffn, m->hidden);
        add_weight(plan, LLA_W_DOWN, "down", l, m->hidden, plan->ffn);
    }
    add_weight(plan, LLA_W_NORM, "norm", 0, m->hidden, 1);
    add_weight(plan, LLA_W_HEAD, "head", 0, plan->vocab, m->hidden);

    char shape[LLA_NAME];
    const char *dtype = lla_dtype_name(m->dtype);
    size_t size = lla_dtype_size(m->dtype);
    snprintf(shape, sizeof shape, "[%zu, 2, %zu] f32", s->limits.max_seq, m->head_dim / 2);
    add(plan, LLA_R_TABLE, "rope", shape, s->limits.max_seq * m->head_dim * 4);
    snprintf(shape, sizeof shape, "[%zu, %zu, %zu, %zu] %s", plan->nblock, plan->nkvhead, s->limits.kv_block,
             m->head_dim, dtype);
    for (size_t l = 0; l < m->nlayer; l++)
        for (int v = 0; v < 2; v++) {
            char name[LLA_NAME];
            size_t nbytes = plan->nblock * s->limits.kv_block * kv * size;
            snprintf(name, sizeof name, "kv.%zu.%c", l, "kv"[v]);
            plan->kv_bytes += add(plan, LLA_R_KV, name, shape, nbytes)->nbytes;
        }
    add_step(plan, "tokens", rows, 1, "i32");
    add_step(plan, "positions", rows, 1, "i32");
    add_step(plan, "row_seq", rows, 1, "i32");
    add_step(plan, "logit_rows", s->limits.max_seqs, 1, "i32");
    add_step(plan, "block_table", s->limits.max_seqs, plan->max_blocks, "i32");
    add_step(plan, "sampling", s->limits.max_seqs, 8, "u32");
    add_step(plan, "next_token", s->limits.max_seqs, 1, "i32");

    const struct {
        const char *name;
        size_t rows, cols, first, last;
    } buffers[] = {
        {"x", rows, m->hidden, EMBED, SAMPLE},
        {"normed", rows, m->hidden, QKV, QKV},
        {"qkv", rows, q + 2 * kv, QKV, ATTENTION},
        {"q", rows, q, QKV, ATTENTION},
        {"attn_out", rows, q, ATTENTION, O},
        {"attn_workspace", s->limits.max_seqs * plan->nhead * 8, m->head_dim + 2, ATTENTION, ATTENTION},
        {"mlp_normed", rows, m->hidden, GATE_UP, GATE_UP},
        {"act", rows, plan->ffn, GATE_UP, DOWN},
        {"logits", s->limits.max_seqs, plan->vocab, HEAD, SAMPLE},
    };
    struct lla_region *r = plan->regions + plan->nregion;
    size_t n = sizeof buffers / sizeof *buffers;
    for (size_t i = 0; i < n; i++) {
        r[i] = (struct lla_region){.kind = LLA_R_ACTIVATION, .first = buffers[i].first, .last = buffers[i].last};
        r[i].nbytes = buffers[i].rows * buffers[i].cols * size;
        snprintf(r[i].name, LLA_NAME, "%s", buffers[i].name);
        snprintf(r[i].shape, LLA_NAME, "[%zu, %zu] %s", buffers[i].rows, buffers[i].cols, dtype);
    }
    place(plan, r, n);
}

static void unmake(struct lla_plan *plan) {
    free(plan->weights);
    free(plan->regions);
}

/* ---- tests ---- */

/* What lla_plan_render writes, to be freed; NULL where it fails. */
static char *rendered(const struct lla_plan *plan, enum lla_plan_format format) {
    char *text = NULL;
    size_t n = 0;
    FILE *out = open_memstream(&text, &n);
    lla_status status = lla_plan_render(plan, format, out);
    fclose(out);
    CHECK_INT(status, LLA_OK);
    if (!status) return text;
    fprintf(stderr, "%s\n", lla_last_error());
    free(text);
    return NULL;
}

static size_t number(const cJSON *object, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    CHECK(cJSON_IsNumber(item));
    return item ? (size_t)item->valuedouble : 0;
}

static const char *string(const cJSON *object, const char *key) {
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, key));
    CHECK(text);
    return text ? text : "";
}

/* Characters of the longest line as people see them. */
static size_t widest(const char *text) {
    size_t most = 0, n = 0;
    for (; *text; text++) {
        if (*text == '\n')
            n = 0;
        else if (((unsigned char)*text & 0xc0) != 0x80 && ++n > most)
            most = n;
    }
    return most;
}

/* Every tag is closed by its own kind in turn, and no text holds a bare angle bracket. */
static bool balanced(const char *xml) {
    char stack[32][16];
    size_t depth = 0;
    for (const char *c = strpbrk(xml, "<>"); c; c = strpbrk(c, "<>")) {
        const char *end = strpbrk(c + 1, "<>");
        if (*c == '>' || !end || *end == '<') return false;
        char name[16] = "";
        bool closes = c[1] == '/';
        sscanf(c + 1 + closes, "%15[a-zA-Z]", name);
        if (closes) {
            if (!depth || strcmp(stack[--depth], name)) return false;
        } else if (end[-1] != '/') {
            if (depth == sizeof stack / sizeof *stack) return false;
            strcpy(stack[depth++], name);
        }
        c = end + 1;
    }
    return depth == 0;
}

static void check_svg(const char *svg) {
    CHECK(svg);
    if (!svg) return;
    CHECK(!strncmp(svg, "<svg ", 5));
    CHECK(balanced(svg));
    CHECK(!strstr(svg, "nan") && !strstr(svg, "\"inf") && !strstr(svg, "\"-inf"));
    CHECK(!strstr(svg, "width=\"-") && !strstr(svg, "height=\"-"));
    CHECK(!strstr(svg, "<script") && !strstr(svg, "href"));
}

TEST(text_shows_every_region) {
    for (size_t i = 0; i < NSHAPE; i++) {
        struct lla_plan plan;
        make(&shapes[i], &plan);
        char *text = rendered(&plan, LLA_PLAN_TEXT);
        for (size_t r = 0; r < plan.nregion; r++) {
            char name[LLA_NAME + 4], stem[LLA_NAME];
            const struct lla_region *region = &plan.regions[r];
            snprintf(stem, sizeof stem, "%s", region->name);
            if (region->kind == LLA_R_WEIGHT) stem[strcspn(stem, ".")] = '\0'; /* a row for all layers */
            if (region->kind == LLA_R_KV)
                snprintf(stem, sizeof stem, "kv.*.%c", region->name[strlen(region->name) - 1]);
            snprintf(name, sizeof name, "\n  %s ", stem);
            CHECK_STR_HAS(text, name);
        }
        CHECK_STR_HAS(text, i == 1 || i == 2 ? "shares embed's bytes" : "head ");
        CHECK_STR_HAS(text, "gate_up → down");
        CHECK(text && widest(text) <= 110);
        free(text);
        unmake(&plan);
    }
}

TEST(text_numbers) {
    struct lla_plan plan;
    make(&shapes[0], &plan);
    char *text = rendered(&plan, LLA_PLAN_TEXT);
    CHECK_STR_HAS(text, "28 × 52.5 MiB");
    CHECK_STR_HAS(text, "1,541,406,720");
    CHECK_STR_HAS(text, "holds 65,536 tokens in 4096 blocks of 16, 28,672 bytes a token");
    CHECK_STR_HAS(text, "100.00%");
    free(text);
    unmake(&plan);
}

TEST(json_sums_to_total) {
    static const char *const classes[] = {"weights", "tables", "kv", "step", "activations", "padding"};
    for (size_t i = 0; i < NSHAPE; i++) {
        struct lla_plan plan;
        make(&shapes[i], &plan);
        char *text = rendered(&plan, LLA_PLAN_JSON);
        cJSON *json = cJSON_Parse(text);
        CHECK(json);
        const cJSON *totals = cJSON_GetObjectItem(json, "totals"), *item;
        size_t sum = 0, of_class[6] = {0}, low = SIZE_MAX, high = 0;
        for (int k = 0; k < 6; k++) sum += number(totals, classes[k]);
        CHECK_INT(sum, plan.total);
        CHECK_INT(number(totals, "total"), plan.total);
        CHECK_INT(number(totals, "activation_sum"), plan.activation_sum);

        const cJSON *regions = cJSON_GetObjectItem(json, "regions"), *weights = cJSON_GetObjectItem(json, "weights");
        CHECK_INT(cJSON_GetArraySize(regions), plan.nregion);
        CHECK_INT(cJSON_GetArraySize(weights), plan.nweight);
        size_t r = 0;
        cJSON_ArrayForEach(item, regions) {
            const struct lla_region *region = &plan.regions[r++];
            size_t offset = number(item, "offset"), nbytes = number(item, "nbytes");
            CHECK(!strcmp(string(item, "name"), region->name) && !strcmp(string(item, "shape"), region->shape));
            CHECK(offset == region->offset && nbytes == region->nbytes);
            CHECK(number(item, "first") == region->first && number(item, "last") == region->last);
            for (int k = 0; k < 6; k++)
                if (!strcmp(string(item, "class"), classes[k])) of_class[k] += nbytes;
            if (region->kind != LLA_R_ACTIVATION) continue;
            if (offset < low) low = offset;
            if (offset + nbytes > high) high = offset + nbytes;
        }
        for (int k = 0; k < 4; k++) CHECK_INT(number(totals, classes[k]), of_class[k]);
        CHECK_INT(of_class[4], plan.activation_sum);
        CHECK_INT(number(totals, "activations"), high - low);
        CHECK_INT(number(cJSON_GetObjectItem(json, "kv"), "tokens"), plan.limits.kv_tokens);
        CHECK_INT(cJSON_GetArraySize(cJSON_GetObjectItem(cJSON_GetObjectItem(json, "step"), "nodes")), NNODE);
        cJSON_Delete(json);
        free(text);
        unmake(&plan);
    }
}

TEST(svg_is_well_formed) {
    for (size_t i = 0; i < NSHAPE; i++) {
        struct lla_plan plan;
        make(&shapes[i], &plan);
        char *svg = rendered(&plan, LLA_PLAN_SVG);
        check_svg(svg);
        for (size_t r = 0; r < plan.nregion; r++)
            if (plan.regions[r].kind == LLA_R_ACTIVATION) CHECK_STR_HAS(svg, plan.regions[r].name);
        CHECK_STR_HAS(svg, "KV cache");
        free(svg);
        unmake(&plan);
    }
}

/* Names may hold anything, nodes may have no names, and every node may be listed by itself. */
TEST(odd_plans) {
    static const char *const odd = "a<b>&\"c\"\\\t";
    struct lla_plan plan;
    make(&shapes[0], &plan);
    plan.nnode = 143, plan.node_names = NULL, plan.repeat = plan.repeat_first = plan.repeat_last = 0;
    snprintf(plan.regions[plan.nregion - 1].name, LLA_NAME, "%s", odd);
    plan.regions[plan.nregion - 1].last = 140;
    char *svg = rendered(&plan, LLA_PLAN_SVG), *text = rendered(&plan, LLA_PLAN_JSON);
    check_svg(svg);
    CHECK_STR_HAS(svg, "a&lt;b&gt;&amp;&quot;c&quot;");
    cJSON *json = cJSON_Parse(text);
    const cJSON *regions = cJSON_GetObjectItem(json, "regions");
    CHECK(!strcmp(string(cJSON_GetArrayItem(regions, (int)plan.nregion - 1), "name"), odd));
    cJSON_Delete(json);
    free(svg), free(text);

    while (plan.regions[plan.nregion - 1].kind != LLA_R_KV) plan.nregion--; /* neither activations nor step */
    plan.activation_bytes = plan.activation_sum = 0;
    check_svg(svg = rendered(&plan, LLA_PLAN_SVG));
    text = rendered(&plan, LLA_PLAN_TEXT);
    CHECK_STR_HAS(text, "KV cache");
    free(svg), free(text);
    unmake(&plan);
}

TEST(impossible_plans_are_refused) {
    struct lla_plan plan, empty = {0};
    char *text = NULL;
    size_t n = 0;
    FILE *out = open_memstream(&text, &n);
    make(&shapes[1], &plan);
    plan.regions[3].offset = plan.total;
    for (int format = LLA_PLAN_TEXT; format <= LLA_PLAN_SVG; format++)
        CHECK_INT(lla_plan_render(&plan, (enum lla_plan_format)format, out), LLA_EINVAL);
    CHECK_STR_HAS(lla_last_error(), plan.regions[3].name);
    CHECK_INT(lla_plan_render(&empty, LLA_PLAN_SVG, out), LLA_EINVAL);
    CHECK_INT(lla_plan_render(&plan, (enum lla_plan_format)9, out), LLA_EINVAL);
    fclose(out);
    free(text);
    unmake(&plan);
}

TEST(failed_writes_are_reported) {
    FILE *full = fopen("/dev/full", "w");
    if (!full) return; /* not on this system */
    struct lla_plan plan;
    make(&shapes[1], &plan);
    CHECK_INT(lla_plan_render(&plan, LLA_PLAN_TEXT, full), LLA_EIO);
    fclose(full);
    unmake(&plan);
}

/* A host's decimal comma stays out of JSON. */
TEST(locale_does_not_matter) {
    struct lla_plan plan;
    make(&shapes[1], &plan);
    char *plain = rendered(&plan, LLA_PLAN_JSON);
    if (setlocale(LC_NUMERIC, "de_DE.UTF-8")) {
        char *german = rendered(&plan, LLA_PLAN_JSON);
        CHECK(plain && german && !strcmp(plain, german));
        free(german);
        setlocale(LC_NUMERIC, "C");
    }
    free(plain);
    unmake(&plan);
}

RUN_TESTS()
