/* render.c: the plan as a table for people and as JSON for programs. The picture is in render_svg.c. */
#include "render.h"

#include <locale.h>
#include <math.h>

static const char *const class_names[RENDER_CLASSES] = {"weights", "tables", "kv", "step", "activations", "padding"};
static const char *const weight_names[LLA_W_KINDS] = {"embed",    "attn_norm", "qkv",  "qkv_bias", "o",
                                                      "mlp_norm", "gate_up",   "down", "norm",     "head"};

const char *lla_render_size(char out[24], size_t nbytes) {
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)nbytes;
    size_t u = 0;
    while (value >= 1023.95 && u + 1 < sizeof unit / sizeof *unit) value /= 1024, u++;
    int decimals = u == 0 ? 0 : value < 9.995 ? 2 : 1;
    snprintf(out, 24, "%.*f %s", decimals, value, unit[u]);
    return out;
}

const char *lla_render_count(char out[32], size_t value) {
    char digits[24];
    int n = snprintf(digits, sizeof digits, "%zu", value), at = 0;
    for (int i = 0; i < n; i++) {
        if (i && (n - i) % 3 == 0) out[at++] = ',';
        out[at++] = digits[i];
    }
    out[at] = '\0';
    return out;
}

lla_status lla_render_totals(const struct lla_plan *plan, size_t bytes[RENDER_CLASSES]) {
    size_t sum = plan->activation_bytes;
    memset(bytes, 0, RENDER_CLASSES * sizeof *bytes);
    for (size_t i = 0; i < plan->nregion; i++) {
        const struct lla_region *r = &plan->regions[i];
        LLA_REQUIRE((unsigned)r->kind <= LLA_R_ACTIVATION, LLA_EINVAL, "region %s: no such kind: %d", r->name,
                    (int)r->kind);
        LLA_REQUIRE(r->offset <= plan->total && r->nbytes <= plan->total - r->offset, LLA_EINVAL,
                    "region %s: ends at byte %zu of an arena of %zu", r->name, r->offset + r->nbytes, plan->total);
        if (r->kind == LLA_R_ACTIVATION) continue;
        bytes[r->kind] += r->nbytes;
        sum += r->nbytes;
    }
    LLA_REQUIRE(sum <= plan->total, LLA_EINVAL, "regions of %zu bytes in an arena of %zu", sum, plan->total);
    bytes[LLA_R_ACTIVATION] = plan->activation_bytes;
    bytes[RENDER_PADDING] = plan->total - sum;
    return LLA_OK;
}

static size_t kv_token_bytes(const struct lla_plan *plan) {
    return 2 * plan->spec.nlayer * plan->nkvhead * plan->spec.head_dim * lla_dtype_size(plan->spec.dtype);
}

/* Block 0 is the padding rows' dummy and holds no tokens. */
static size_t kv_tokens(const struct lla_plan *plan) {
    return plan->nblock ? (plan->nblock - 1) * plan->limits.kv_block : 0;
}

/* ---- text ---- */

enum {
    TEXT_WIDTH = 110,
    TEXT_NAME = 18,
    TEXT_SHAPE = 25,
    TEXT_NOTE = 23,
    TEXT_SIZE = 10,
    TEXT_BYTES = 15,
    TEXT_BAR = 40
};

/* Writes text in a column of `width` characters (UTF-8 counts as people see it), cutting what does not fit. */
static void column(FILE *out, const char *text, int width, bool right) {
    int shown = 0;
    for (const char *c = text; *c; c++) shown += ((unsigned char)*c & 0xc0) != 0x80;
    for (int i = shown; right && i < width; i++) fputc(' ', out);
    int keep = shown > width ? width - 1 : shown;
    for (const char *c = text; *c; c++) {
        if (((unsigned char)*c & 0xc0) != 0x80 && keep-- == 0) break;
        fputc(*c, out);
    }
    if (shown > width) fputs("…", out);
    for (int i = shown; !right && i < width; i++) fputc(' ', out);
}

static void rule(FILE *out) {
    for (int i = 0; i < TEXT_WIDTH; i++) fputs("─", out);
    fputc('\n', out);
}

static void text_cells(FILE *out, const char *name, const char *shape, const char *note, const char *size,
                       const char *bytes, const char *offset) {
    fputs("  ", out);
    column(out, name, TEXT_NAME, false), fputc(' ', out);
    column(out, shape, TEXT_SHAPE, false), fputc(' ', out);
    column(out, note, TEXT_NOTE, false), fputc(' ', out);
    column(out, size, TEXT_SIZE, true), fputc(' ', out);
    column(out, bytes, TEXT_BYTES, true), fputc(' ', out);
    column(out, offset, 12, true), fputc('\n', out);
}

static void text_row(FILE *out, const char *name, const char *shape, const char *note, size_t nbytes, size_t offset) {
    char size[24], bytes[32], at[32];
    snprintf(at, sizeof at, "0x%zx", offset);
    text_cells(out, name, shape, note, lla_render_size(size, nbytes), lla_render_count(bytes, nbytes), at);
}

static void text_section(FILE *out, const char *title, const char *note) {
    fputc('\n', out);
    fputs(title, out);
    fprintf(out, "%*s", (int)(2 + TEXT_NAME + 1 + TEXT_SHAPE + 1 - strlen(title)), "");
    column(out, note, TEXT_NOTE, false);
    fprintf(out, " %*s %*s %*s\n", TEXT_SIZE, "size", TEXT_BYTES, "bytes", 12, "offset");
    rule(out);
}

static void count_note(char out[64], size_t count, size_t each) {
    char size[24];
    if (count > 1)
        snprintf(out, 64, "%zu × %s", count, lla_render_size(size, each));
    else
        out[0] = '\0';
}

static void text_weights(const struct lla_plan *plan, FILE *out) {
    text_section(out, "weights", "count");
    for (size_t kind = 0; kind < LLA_W_KINDS; kind++) {
        const struct lla_weight *first = NULL;
        size_t count = 0, nbytes = 0;
        for (size_t i = 0; i < plan->nweight; i++) {
            const struct lla_weight *w = &plan->weights[i];
            if ((size_t)w->kind != kind) continue;
            if (!first) first = w;
            count++;
            nbytes += w->nbytes;
        }
        if (!first) continue;
        char shape[64], note[64];
        const char *dtype = lla_dtype_name(plan->spec.dtype);
        if (first->cols > 1)
            snprintf(shape, sizeof shape, "[%zu, %zu] %s", first->rows, first->cols, dtype);
        else
            snprintf(shape, sizeof shape, "[%zu] %s", first->rows, dtype);
        count_note(note, count, first->nbytes);
        if (kind == LLA_W_HEAD && plan->weights[0].kind == LLA_W_EMBED && first->offset == plan->weights[0].offset)
            text_cells(out, weight_names[kind], shape, "shares embed's bytes", "-", "-", "-");
        else
            text_row(out, weight_names[kind], shape, note, nbytes, first->offset);
    }
}

/* "kv.27.k" and "kv.3.k" are both "kv.*.k". */
static void name_pattern(char out[LLA_NAME], const char *name) {
    size_t n = 0;
    for (; *name && n + 1 < LLA_NAME; name++) {
        bool digit = *name >= '0' && *name <= '9';
        if (!digit)
            out[n++] = *name;
        else if (!n || out[n - 1] != '*')
            out[n++] = '*';
    }
    out[n] = '\0';
}

static bool same_group(const struct lla_region *a, const struct lla_region *b) {
    char pattern[2][LLA_NAME];
    if (a->kind != b->kind || a->nbytes != b->nbytes || strcmp(a->shape, b->shape)) return false;
    name_pattern(pattern[0], a->name);
    name_pattern(pattern[1], b->name);
    return !strcmp(pattern[0], pattern[1]);
}

/* A row for each region of a kind, or for all those that differ in a number of their names only. */
static void text_class(const struct lla_plan *plan, enum lla_region_kind kind, const char *title, FILE *out) {
    bool any = false;
    for (size_t i = 0; i < plan->nregion; i++) {
        const struct lla_region *r = &plan->regions[i];
        size_t count = 0, seen = 0;
        if (r->kind != kind) continue;
        for (size_t k = 0; k < plan->nregion; k++)
            if (same_group(r, &plan->regions[k])) seen += k < i, count++;
        if (seen) continue;
        char note[64], name[LLA_NAME];
        if (!any) text_section(out, title, "count");
        count_note(note, count, r->nbytes);
        name_pattern(name, r->name);
        text_row(out, count > 1 ? name : r->name, r->shape, note, count * r->nbytes, r->offset);
        any = true;
    }
}

static void node_label(const struct lla_plan *plan, size_t node, char out[32]) {
    if (plan->node_names && node < plan->nnode)
        snprintf(out, 32, "%s", plan->node_names[node]);
    else
        snprintf(out, 32, "node %zu", node);
}

static void text_activations(const struct lla_plan *plan, FILE *out) {
    bool any = false;
    for (size_t i = 0; i < plan->nregion; i++) {
        const struct lla_region *r = &plan->regions[i];
        if (r->kind != LLA_R_ACTIVATION) continue;
        char note[80], first[32], last[32];
        node_label(plan, r->first, first);
        node_label(plan, r->last, last);
        if (r->first == 0 && r->last + 1 >= plan->nnode)
            snprintf(note, sizeof note, "the whole step");
        else if (r->first == r->last)
            snprintf(note, sizeof note, "%s", first);
        else
            snprintf(note, sizeof note, "%s → %s", first, last);
        if (!any) text_section(out, "activations", "written → last read");
        text_row(out, r->name, r->shape, note, r->nbytes, r->offset);
        any = true;
    }
}

static void text_total(FILE *out, const char *name, size_t nbytes, size_t total) {
    char size[24], bytes[32];
    double share = total ? (double)nbytes / (double)total : 0;
    int bar = (int)(share * TEXT_BAR + 0.5);
    fputs("  ", out);
    column(out, name, TEXT_NAME, false), fputc(' ', out);
    for (int i = 0; i < TEXT_BAR; i++) fputs(i < bar ? "━" : "┄", out);
    char percent[16];
    snprintf(percent, sizeof percent, nbytes && share < 0.00005 ? "<0.01%%" : "%.2f%%", 100 * share);
    fprintf(out, " %7s  %*s %*s\n", percent, TEXT_SIZE, lla_render_size(size, nbytes), TEXT_BYTES,
            lla_render_count(bytes, nbytes));
}

static void text_head(const struct lla_plan *plan, FILE *out) {
    const struct lla_spec *s = &plan->spec;
    char kv[32];
    fprintf(out, "model    %zu layers, hidden %zu, %zu query and %zu KV heads of %zu, FFN %zu, vocabulary %zu, %s\n",
            s->nlayer, s->hidden, s->nhead, s->nkvhead, s->head_dim, s->ffn, s->vocab, lla_dtype_name(s->dtype));
    fprintf(out, "limits   %zu tokens a sequence, %zu sequence%s, %s KV tokens in blocks of %zu, %zu rows a step\n",
            plan->limits.max_seq, plan->limits.max_seqs, plan->limits.max_seqs == 1 ? "" : "s",
            lla_render_count(kv, plan->limits.kv_tokens), plan->limits.kv_block, plan->max_rows);
    fprintf(out, "rank     %zu of %zu", plan->shard.rank, plan->shard.degree);
    if (plan->shard.degree > 1)
        fprintf(out, ": %zu query heads, KV heads %zu to %zu, FFN %zu, vocabulary rows %zu to %zu", plan->nhead,
                plan->kvhead0, plan->kvhead0 + plan->nkvhead - 1, plan->ffn, plan->vocab0,
                plan->vocab0 + plan->vocab - 1);
    fputc('\n', out);
}

static lla_status render_text(const struct lla_plan *plan, FILE *out) {
    size_t bytes[RENDER_CLASSES];
    char a[32], b[32];
    LLA_TRY(lla_render_totals(plan, bytes));
    text_head(plan, out);
    text_weights(plan, out);
    text_class(plan, LLA_R_TABLE, "tables", out);
    text_class(plan, LLA_R_KV, "KV cache", out);
    text_class(plan, LLA_R_STEP, "step inputs and outputs", out);
    text_activations(plan, out);

    fputs("\ntotals\n", out);
    rule(out);
    for (size_t i = 0; i < RENDER_CLASSES; i++)
        text_total(out, i == LLA_R_KV ? "KV cache" : class_names[i], bytes[i], plan->total);
    text_total(out, "arena", plan->total, plan->total);
    fprintf(out, "\n  KV cache holds %s tokens", lla_render_count(a, kv_tokens(plan)));
    fprintf(out, " in %zu blocks of %zu, %s bytes a token\n", plan->nblock ? plan->nblock - 1 : 0,
            plan->limits.kv_block, lla_render_count(a, kv_token_bytes(plan)));
    size_t saved = plan->activation_sum > plan->activation_bytes ? plan->activation_sum - plan->activation_bytes : 0;
    fprintf(out, "  activations of %s share %s", lla_render_size(a, plan->activation_sum),
            lla_render_size(b, plan->activation_bytes));
    fprintf(out, ": %s (%.0f%%) saved by overlaying lifetimes\n", lla_render_size(a, saved),
            plan->activation_sum ? 100.0 * (double)saved / (double)plan->activation_sum : 0.0);
    return LLA_OK;
}

/* ---- JSON ----
 *
 * One object; every number is exact and in bytes, tokens, rows or nodes; keys keep this order:
 *
 *   "version": 1
 *   "spec":    {dtype, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, max_position, tied, eps, theta, eos: []}
 *   "limits":  {max_seq, max_seqs, kv_tokens, kv_block, prefill_chunk}
 *   "shard":   {rank, degree, heads, kv_heads, kv_head0, ffn, vocab, vocab0}; the counts are this rank's share
 *   "kv":      {blocks, dummy_blocks, blocks_per_seq, tokens, bytes_per_token}; blocks includes the dummy
 *   "step":    {max_rows, nodes: [name, ..], repeat: {first, last, times}}; nodes first .. last run `times` times
 *   "totals":  {weights, tables, kv, step, activations, padding, total, activation_sum}; the first six sum to total;
 *              activation_sum is what activations would take without overlaying
 *   "regions": [{name, class, shape, offset, nbytes, first, last}, ..], in order of offset; class is a key of totals;
 *              activations may share bytes; first and last are nodes
 *   "weights": [{kind, layer, rows, cols, offset, nbytes, parts: [{name, row0, rows, col0, cols, dst_row}, ..]}, ..]
 */

static void json_string(FILE *out, const char *text) {
    fputc('"', out);
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        if (*c == '"' || *c == '\\')
            fprintf(out, "\\%c", *c);
        else if (*c < 0x20 || *c == 0x7f)
            fprintf(out, "\\u%04x", *c);
        else
            fputc(*c, out);
    }
    fputc('"', out);
}

/* `lead` is what stands before the key: "" for the first of an object, ", " within a line. */
static void json_size(FILE *out, const char *lead, const char *key, size_t value) {
    fprintf(out, "%s\"%s\": %zu", lead, key, value);
}

static void json_text(FILE *out, const char *lead, const char *key, const char *value) {
    fprintf(out, "%s\"%s\": ", lead, key);
    json_string(out, value);
}

static void json_real(FILE *out, const char *lead, const char *key, double value, int digits) {
    fprintf(out, "%s\"%s\": ", lead, key);
    if (isfinite(value))
        fprintf(out, "%.*g", digits, value);
    else
        fputs("null", out);
}

static void json_spec(const struct lla_spec *s, FILE *out) {
    json_text(out, "  \"spec\": {", "dtype", lla_dtype_name(s->dtype));
    json_size(out, ", ", "layers", s->nlayer);
    json_size(out, ", ", "hidden", s->hidden);
    json_size(out, ", ", "heads", s->nhead);
    json_size(out, ", ", "kv_heads", s->nkvhead);
    json_size(out, ", ", "head_dim", s->head_dim);
    json_size(out, ", ", "ffn", s->ffn);
    json_size(out, ", ", "vocab", s->vocab);
    json_size(out, ", ", "max_position", s->max_position);
    fprintf(out, ", \"tied\": %s", s->tied ? "true" : "false");
    json_real(out, ", ", "eps", (double)s->eps, 9);
    json_real(out, ", ", "theta", s->theta, 17);
    fputs(", \"eos\": [", out);
    for (size_t i = 0; i < s->neos && i < LLA_MAX_EOS; i++) fprintf(out, "%s%lld", i ? ", " : "", (long long)s->eos[i]);
    fputs("]},\n", out);
}

static void json_settings(const struct lla_plan *plan, FILE *out) {
    const struct lla_limits *l = &plan->limits;
    json_size(out, "  \"limits\": {", "max_seq", l->max_seq);
    json_size(out, ", ", "max_seqs", l->max_seqs);
    json_size(out, ", ", "kv_tokens", l->kv_tokens);
    json_size(out, ", ", "kv_block", l->kv_block);
    json_size(out, ", ", "prefill_chunk", l->prefill_chunk);
    json_size(out, "},\n  \"shard\": {", "rank", plan->shard.rank);
    json_size(out, ", ", "degree", plan->shard.degree);
    json_size(out, ", ", "heads", plan->nhead);
    json_size(out, ", ", "kv_heads", plan->nkvhead);
    json_size(out, ", ", "kv_head0", plan->kvhead0);
    json_size(out, ", ", "ffn", plan->ffn);
    json_size(out, ", ", "vocab", plan->vocab);
    json_size(out, ", ", "vocab0", plan->vocab0);
    json_size(out, "},\n  \"kv\": {", "blocks", plan->nblock);
    json_size(out, ", ", "dummy_blocks", plan->nblock ? 1 : 0);
    json_size(out, ", ", "blocks_per_seq", plan->max_blocks);
    json_size(out, ", ", "tokens", kv_tokens(plan));
    json_size(out, ", ", "bytes_per_token", kv_token_bytes(plan));
    json_size(out, "},\n  \"step\": {", "max_rows", plan->max_rows);
    fputs(", \"nodes\": [", out);
    for (size_t i = 0; i < plan->nnode; i++) {
        char label[32];
        node_label(plan, i, label);
        fputs(i ? ", " : "", out);
        json_string(out, label);
    }
    json_size(out, "], \"repeat\": {", "first", plan->repeat_first);
    json_size(out, ", ", "last", plan->repeat_last);
    json_size(out, ", ", "times", plan->repeat ? plan->repeat : 1);
    fputs("}},\n", out);
}

static void json_region(const struct lla_region *r, FILE *out) {
    json_text(out, "    {", "name", r->name);
    json_text(out, ", ", "class", class_names[r->kind]);
    json_text(out, ", ", "shape", r->shape);
    json_size(out, ", ", "offset", r->offset);
    json_size(out, ", ", "nbytes", r->nbytes);
    json_size(out, ", ", "first", r->first);
    json_size(out, ", ", "last", r->last);
    fputc('}', out);
}

static void json_weight(const struct lla_weight *w, FILE *out) {
    json_text(out, "    {", "kind", (unsigned)w->kind < LLA_W_KINDS ? weight_names[w->kind] : "unknown");
    json_size(out, ", ", "layer", w->layer);
    json_size(out, ", ", "rows", w->rows);
    json_size(out, ", ", "cols", w->cols);
    json_size(out, ", ", "offset", w->offset);
    json_size(out, ", ", "nbytes", w->nbytes);
    fputs(", \"parts\": [", out);
    for (size_t i = 0; i < w->nparts && i < LLA_MAX_PARTS; i++) {
        const struct lla_weight_part *p = &w->parts[i];
        json_text(out, i ? ", {" : "{", "name", p->name);
        json_size(out, ", ", "row0", p->row0);
        json_size(out, ", ", "rows", p->rows);
        json_size(out, ", ", "col0", p->col0);
        json_size(out, ", ", "cols", p->cols);
        json_size(out, ", ", "dst_row", p->dst_row);
        fputc('}', out);
    }
    fputs("]}", out);
}

static lla_status render_json(const struct lla_plan *plan, FILE *out) {
    size_t bytes[RENDER_CLASSES];
    LLA_TRY(lla_render_totals(plan, bytes));
    fputs("{\n  \"version\": 1,\n", out);
    json_spec(&plan->spec, out);
    json_settings(plan, out);
    for (size_t i = 0; i < RENDER_CLASSES; i++) json_size(out, i ? ", " : "  \"totals\": {", class_names[i], bytes[i]);
    json_size(out, ", ", "total", plan->total);
    json_size(out, ", ", "activation_sum", plan->activation_sum);
    fputs("},\n  \"regions\": [", out);
    for (size_t i = 0; i < plan->nregion; i++) fputs(i ? ",\n" : "\n", out), json_region(&plan->regions[i], out);
    fputs("\n  ],\n  \"weights\": [", out);
    for (size_t i = 0; i < plan->nweight; i++) fputs(i ? ",\n" : "\n", out), json_weight(&plan->weights[i], out);
    fputs("\n  ]\n}\n", out);
    return LLA_OK;
}

lla_status lla_plan_render(const struct lla_plan *plan, enum lla_plan_format format, FILE *out) {
    static lla_status (*const render[])(const struct lla_plan *, FILE *) = {render_text, render_json,
                                                                            lla_plan_render_svg};
    LLA_REQUIRE((unsigned)format < sizeof render / sizeof *render, LLA_EINVAL, "no such plan format: %d", (int)format);
    /* A host's locale must not turn the points of JSON and SVG numbers into commas. */
    locale_t c = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0);
    LLA_REQUIRE(c, LLA_ENOMEM, "cannot make the C locale");
    locale_t host = uselocale(c);
    lla_status status = render[format](plan, out);
    uselocale(host);
    freelocale(c);
    if (!status && (fflush(out) || ferror(out))) status = lla_fail(LLA_EIO, "cannot write the plan");
    return status;
}
