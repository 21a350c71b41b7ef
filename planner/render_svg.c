/* render_svg.c: the plan as a picture: a map of the arena to scale, enlarged where it is too fine to see; under it the
 * lifetimes of render_lifetimes.c. One file of plain shapes: no scripts, styles or fonts from elsewhere. */
#include "render.h"

#include <stdlib.h>

enum { MAX_WINDOWS = 8 };

/* What a byte of the arena belongs to: the rows of the legend. */
enum part {
    PART_EMBED,
    PART_QKV,
    PART_O,
    PART_GATE_UP,
    PART_DOWN,
    PART_NORM,
    PART_HEAD,
    PART_TABLE,
    PART_KV,
    PART_STEP,
    PART_ACTIVATION,
    PART_PADDING,
    PARTS
};

static const struct {
    const char *name, *fill, *tint, *ink; /* tint: every other piece, ink: text on both */
} part_look[PARTS] = {
    [PART_EMBED] = {"embedding", "#2f4a7a", "#2f4a7a", "#ffffff"},
    [PART_QKV] = {"QKV projections", "#8fb3e8", "#a4c1ec", SVG_INK},
    [PART_O] = {"attention outputs", "#b9d0f3", "#c8daf6", SVG_INK},
    [PART_GATE_UP] = {"gate and up", "#3f6fbf", "#5580c8", "#ffffff"},
    [PART_DOWN] = {"down", "#6592d8", "#7aa1de", "#ffffff"},
    [PART_NORM] = {"norms and biases", "#9aa5b8", "#9aa5b8", SVG_INK},
    [PART_HEAD] = {"LM head", "#465f90", "#465f90", "#ffffff"},
    [PART_TABLE] = {"tables", "#8b6fc4", "#9c83ce", "#ffffff"},
    [PART_KV] = {"KV cache", "#1f8a80", "#27958b", "#ffffff"},
    [PART_STEP] = {"step inputs and outputs", "#eab04a", "#f0c373", SVG_INK},
    [PART_ACTIVATION] = {"activations", SVG_ACTIVATION, "#e27f69", "#ffffff"},
    [PART_PADDING] = {"alignment", "#e5e7eb", "#e5e7eb", SVG_INK},
};

/* ---- shapes ---- */

static void escaped(FILE *out, const char *text) {
    static const char *const entities[256] = {['<'] = "&lt;", ['>'] = "&gt;", ['&'] = "&amp;", ['"'] = "&quot;"};
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (entities[c])
            fputs(entities[c], out);
        else
            fputc(c < 0x20 ? ' ' : c, out);
    }
}

double lla_svg_text_width(const char *text, double size, bool bold) {
    double em = 0;
    for (; *text; text++) {
        char c = *text;
        if (((unsigned char)c & 0xc0) == 0x80) continue;
        em += strchr("iljI.,:;|'!", c) ? 0.33 : strchr(" ftr()[]-/", c) ? 0.42 : strchr("mwMW%@", c) ? 0.97 : 0.62;
        if (c >= 'A' && c <= 'Z' && c != 'I') em += 0.1;
    }
    return em * size * (bold ? 1.08 : 1);
}

void lla_svg_label(FILE *out, double x, double y, double size, enum lla_svg_anchor anchor, const char *fill, bool bold,
                   const char *text) {
    static const char *const anchors[] = {"start", "middle", "end"};
    fprintf(out, "<text x=\"%.1f\" y=\"%.1f\" font-size=\"%g\" fill=\"%s\" text-anchor=\"%s\"%s>", x, y, size, fill,
            anchors[anchor], bold ? " font-weight=\"600\"" : "");
    escaped(out, text);
    fputs("</text>\n", out);
}

void lla_svg_heading(FILE *out, double y, const char *title, const char *more) {
    fprintf(out, "<text x=\"%d\" y=\"%.1f\" font-size=\"17\" font-weight=\"600\" fill=\"" SVG_INK "\">%s", SVG_LEFT, y,
            title);
    fprintf(out, "<tspan dx=\"10\" font-size=\"13\" font-weight=\"400\" fill=\"" SVG_FAINT "\">%s</tspan></text>\n",
            more);
}

void lla_svg_box(FILE *out, double x, double y, double w, double h, double radius, const char *fill, const char *more,
                 const char *title) {
    fprintf(out, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" rx=\"%g\" fill=\"%s\"%s%s", x, y, w, h,
            radius, fill, *more ? " " : "", more);
    if (title) {
        fputs("><title>", out);
        escaped(out, title);
        fputs("</title></rect>\n", out);
    } else {
        fputs("/>\n", out);
    }
}

void lla_svg_line(FILE *out, double x0, double y0, double x1, double y1, const char *stroke, const char *more) {
    fprintf(out, "<path d=\"M%.1f %.1fL%.1f %.1f\" stroke=\"%s\" fill=\"none\"%s%s/>\n", x0, y0, x1, y1, stroke,
            *more ? " " : "", more);
}

/* ---- the arena ---- */

/* A stretch of the arena drawn as one box. */
struct piece {
    enum part part;
    size_t layer;
    bool in_layer, odd;
    size_t offset, nbytes;
    const char *name, *shape;
};

struct window {
    size_t begin, end; /* bytes */
    double x, w;
};

/* A strip shows windows of the arena side by side, in one scale. */
struct strip {
    struct window windows[MAX_WINDOWS];
    size_t n, nbytes;
    double y, h, scale; /* scale: pixels a byte */
};

static const struct lla_weight *weight_at(const struct lla_plan *plan, size_t offset, size_t *at) {
    for (size_t i = 0; i < plan->nweight; i++) { /* both are in order of offset: the next one is the usual hit */
        size_t k = (*at + i) % plan->nweight;
        if (plan->weights[k].offset == offset) return *at = k + 1, &plan->weights[k];
    }
    return NULL;
}

static enum part part_of(const struct lla_weight *w) { /* in order of lla_weight_kind */
    static const enum part parts[LLA_W_KINDS] = {PART_EMBED, PART_NORM,    PART_QKV,  PART_NORM, PART_O,
                                                 PART_NORM,  PART_GATE_UP, PART_DOWN, PART_NORM, PART_HEAD};
    return w && (unsigned)w->kind < LLA_W_KINDS ? parts[w->kind] : PART_NORM;
}

/* The pieces of the arena in order of offset; activations, which share bytes, are one. */
static size_t make_pieces(const struct lla_plan *plan, struct piece *pieces) {
    size_t n = 0, at = 0, activation = 0, odd[PARTS] = {0};
    static const enum part parts[] = {PART_NORM, PART_TABLE, PART_KV, PART_STEP, PART_ACTIVATION};
    for (size_t i = 0; i < plan->nregion; i++) {
        const struct lla_region *r = &plan->regions[i];
        struct piece p = {parts[r->kind], 0, false, false, r->offset, r->nbytes, r->name, r->shape};
        if (r->kind == LLA_R_ACTIVATION) {
            p.nbytes = plan->activation_bytes;
            p.name = part_look[PART_ACTIVATION].name, p.shape = "overlaid, see below";
            if (odd[PART_ACTIVATION]++) { /* the first of them in the list need not be the lowest */
                if (r->offset < pieces[activation].offset) pieces[activation].offset = r->offset;
                continue;
            }
            activation = n;
        } else if (r->kind == LLA_R_WEIGHT) {
            const struct lla_weight *w = weight_at(plan, r->offset, &at);
            p.part = part_of(w);
            p.in_layer = w && w->kind > LLA_W_EMBED && w->kind < LLA_W_NORM;
            p.layer = w ? w->layer : 0;
            p.odd = p.layer % 2;
        } else {
            p.odd = odd[p.part]++ % 2;
        }
        pieces[n++] = p;
    }
    return n;
}

/* Joins neighbouring pieces of one part. */
static size_t join(struct piece *out, const struct piece *pieces, size_t count, enum part part) {
    size_t n = 0;
    for (size_t i = 0; i < count; i++) {
        if (n && pieces[i].part == part && out[n - 1].part == part) {
            out[n - 1].nbytes = pieces[i].offset + pieces[i].nbytes - out[n - 1].offset;
        } else {
            out[n] = pieces[i];
            if (pieces[i].part == part) out[n].name = part_look[part].name, out[n].shape = "", out[n].odd = false;
            n++;
        }
    }
    return n;
}

static bool in_mask(const struct piece *p, unsigned mask) {
    return mask >> p->part & 1;
}

/* Windows for the runs of pieces in the mask; no windows where there would be too many to tell apart. */
static void strip_windows(struct strip *s, const struct piece *pieces, size_t count, unsigned mask) {
    const double gap = 12;
    s->n = s->nbytes = 0;
    for (size_t i = 0; i < count; i++) {
        if (!in_mask(&pieces[i], mask)) continue;
        size_t end = pieces[i].offset + pieces[i].nbytes;
        if (!i || !in_mask(&pieces[i - 1], mask)) {
            if (s->n == MAX_WINDOWS) {
                s->n = s->nbytes = 0;
                return;
            }
            s->windows[s->n++].begin = pieces[i].offset;
        }
        s->windows[s->n - 1].end = end;
    }
    for (size_t i = 0; i < s->n; i++) s->nbytes += s->windows[i].end - s->windows[i].begin;
    double room = SVG_RIGHT - SVG_LEFT - gap * (double)(s->n ? s->n - 1 : 0), x = SVG_LEFT, least = 3;
    if (s->nbytes) s->scale = (room - least * (double)s->n) / (double)s->nbytes;
    for (size_t i = 0; i < s->n; i++) {
        s->windows[i].x = x;
        s->windows[i].w = least + s->scale * (double)(s->windows[i].end - s->windows[i].begin);
        x += s->windows[i].w + gap;
    }
}

static double strip_x(const struct strip *s, size_t offset) {
    for (size_t i = 0; i < s->n; i++)
        if (offset <= s->windows[i].end) {
            const struct window *w = &s->windows[i];
            size_t span = w->end - w->begin;
            return w->x + (offset > w->begin && span ? w->w * ((double)(offset - w->begin) / (double)span) : 0);
        }
    return SVG_RIGHT;
}

/* The bands that join what is enlarged to where it is; straight at their lower end, where the caption stands. */
static void guides(FILE *out, const struct strip *from, const struct strip *to, double caption) {
    for (size_t i = 0; i < to->n; i++) {
        double x0 = to->windows[i].x, x1 = x0 + to->windows[i].w, low = to->y - caption;
        double a = strip_x(from, to->windows[i].begin), b = strip_x(from, to->windows[i].end);
        double top = from->y + from->h, mid = (top + low) / 2;
        if (b < a + 1) a -= 0.5, b = a + 1;
        fprintf(out, "<path d=\"M%.1f %.1fC%.1f %.1f %.1f %.1f %.1f %.1fV%.1fH%.1fV%.1f", a, top, a, mid, x0, mid, x0,
                low, to->y, x1, low);
        fprintf(out, "C%.1f %.1f %.1f %.1f %.1f %.1fZ\" ", x1, mid, b, mid, b, top);
        fputs(
            "fill=\"#94a3b8\" fill-opacity=\"0.13\" stroke=\"#94a3b8\" stroke-opacity=\"0.6\" stroke-width=\"0.8\"/>\n",
            out);
    }
}

static void piece_title(char out[400], const struct piece *p) {
    char size[24], count[32];
    snprintf(out, 400, "%s%s%s: %s (%s bytes) at 0x%zx", p->name, *p->shape ? " " : "", p->shape,
             lla_render_size(size, p->nbytes), lla_render_count(count, p->nbytes), p->offset);
}

static void draw_pieces(FILE *out, const struct strip *s, const struct piece *pieces, size_t count, unsigned mask,
                        const char *id) {
    fprintf(out, "<clipPath id=\"%s\">", id);
    for (size_t i = 0; i < s->n; i++)
        lla_svg_box(out, s->windows[i].x, s->y, s->windows[i].w, s->h, s->windows[i].w < 12 ? 1 : 7, "#000", "", NULL);
    fprintf(out, "</clipPath>\n<g clip-path=\"url(#%s)\">\n", id);
    for (size_t i = 0; i < s->n; i++)
        lla_svg_box(out, s->windows[i].x, s->y, s->windows[i].w, s->h, 0, part_look[PART_PADDING].fill, "", NULL);
    for (size_t i = 0; i < count; i++) {
        const struct piece *p = &pieces[i];
        if (!in_mask(p, mask) || !p->nbytes) continue;
        char title[400];
        double x = strip_x(s, p->offset), w = strip_x(s, p->offset + p->nbytes) - x;
        if (w < 0.04) continue; /* norms of a large model: nothing to see or to point at */
        piece_title(title, p);
        bool first_of_layer = p->in_layer && i && pieces[i - 1].layer != p->layer;
        double notch = w > 8 && (first_of_layer || !p->in_layer) && x > SVG_LEFT + 1 ? 0.8 : 0;
        lla_svg_box(out, x + notch, s->y, w - notch, s->h, 0,
                    p->odd ? part_look[p->part].tint : part_look[p->part].fill, "", title);
    }
    fputs("</g>\n", out);
}

/* The label of a run of pieces in the arena's strip; over a pattern it stands on paper. */
static void run_label(FILE *out, const struct strip *s, double x, double w, const char *name, const char *size,
                      const char *ink, bool paper) {
    double need = lla_svg_text_width(name, 13, true), second = lla_svg_text_width(size, 12, false), middle = x + w / 2;
    if (second > need) need = second;
    if (need + 12 + 12 * paper > w) return;
    if (paper) {
        lla_svg_box(out, middle - need / 2 - 10, s->y + s->h / 2 - 22, need + 20, 44, 9, "#ffffff",
                    "fill-opacity=\"0.93\" pointer-events=\"none\"", NULL);
        ink = SVG_INK;
    }
    lla_svg_label(out, middle, s->y + s->h / 2 - 3, 13, SVG_MIDDLE, ink, true, name);
    lla_svg_label(out, middle, s->y + s->h / 2 + 14, 12, SVG_MIDDLE, ink, false, size);
}

static void arena_labels(FILE *out, const struct lla_plan *plan, const struct strip *s, const struct piece *pieces,
                         size_t count) {
    for (size_t i = 0, next; i < count; i = next) {
        size_t nbytes = 0;
        bool mixed = false; /* a run of several pieces is a pattern */
        for (next = i; next < count; next++) {
            const struct piece *p = &pieces[next];
            if (p->in_layer != pieces[i].in_layer || (!p->in_layer && p->part != pieces[i].part)) break;
            nbytes += p->nbytes;
            mixed = next > i;
        }
        const struct piece *last = &pieces[next - 1];
        double x = strip_x(s, pieces[i].offset), w = strip_x(s, last->offset + last->nbytes) - x;
        char name[64], size[64], each[24];
        if (pieces[i].in_layer) {
            snprintf(name, sizeof name, "%zu layers", plan->spec.nlayer);
            snprintf(size, sizeof size, "%zu × %s", plan->spec.nlayer,
                     lla_render_size(each, plan->spec.nlayer ? nbytes / plan->spec.nlayer : 0));
        } else {
            snprintf(name, sizeof name, "%s", part_look[pieces[i].part].name);
            lla_render_size(size, nbytes);
        }
        run_label(out, s, x, w, name, size, part_look[pieces[i].part].ink, mixed);
    }
}

/* Ticks above the strip at a power of two of bytes. */
static void arena_ticks(FILE *out, const struct lla_plan *plan, const struct strip *s) {
    size_t step = 1;
    while (plan->total / step >= 12) step *= 2;
    char total[24];
    double end = SVG_RIGHT - lla_svg_text_width(lla_render_size(total, plan->total), 11, true) - 12;
    for (size_t at = 0; at < plan->total; at += step) {
        char size[24];
        double x = strip_x(s, at);
        lla_render_size(size, at);
        if (!at) snprintf(size, sizeof size, "0");
        if (at && x + lla_svg_text_width(size, 11, false) / 2 > end) break;
        lla_svg_line(out, x, s->y - 6, x, s->y - 1, "#9ca3af", "");
        lla_svg_label(out, x, s->y - 11, 11, at ? SVG_MIDDLE : SVG_START, SVG_FAINT, false, size);
        if (step > plan->total - at) break;
    }
    lla_svg_line(out, SVG_RIGHT, s->y - 6, SVG_RIGHT, s->y - 1, "#9ca3af", "");
    lla_svg_label(out, SVG_RIGHT, s->y - 11, 11, SVG_END, SVG_INK, true, total);
}

/* Labels of an enlarged strip: inside where they fit, else below with a leader, left to right as long as there is room.
 */
static double zoom_labels(FILE *out, const struct strip *s, const struct piece *pieces, size_t count, unsigned mask) {
    double free_x = SVG_LEFT, need_left = 0, bottom = s->y + s->h;
    bool below = false;
    char text[LLA_NAME + 32], size[24];
    for (int pass = 0; pass < 2; pass++) /* the first adds up what stands below, so that all of it stays on the page */
        for (size_t i = 0; i < count; i++) {
            const struct piece *p = &pieces[i];
            if (!in_mask(p, mask)) continue;
            double x = strip_x(s, p->offset), w = strip_x(s, p->offset + p->nbytes) - x, middle = x + w / 2;
            snprintf(text, sizeof text, "%s  %s", p->name, lla_render_size(size, p->nbytes));
            double inside = lla_svg_text_width(p->name, 12, true), second = lla_svg_text_width(size, 11, false);
            double width = lla_svg_text_width(text, 11, false);
            if ((inside > second ? inside : second) + 10 <= w) {
                if (!pass) continue;
                lla_svg_label(out, middle, s->y + s->h / 2 - 2, 12, SVG_MIDDLE, part_look[p->part].ink, true, p->name);
                lla_svg_label(out, middle, s->y + s->h / 2 + 13, 11, SVG_MIDDLE, part_look[p->part].ink, false, size);
            } else if (!pass) {
                need_left += width + 14;
            } else {
                need_left -= width + 14;
                double at = middle - width / 2, most = SVG_RIGHT - need_left - width;
                if (at > most) at = most;
                if (at < free_x) at = free_x;
                if (at + width > SVG_RIGHT) continue;
                fprintf(out, "<path d=\"M%.1f %.1fV%.1fL%.1f %.1f\" stroke=\"#9ca3af\" fill=\"none\"/>\n", middle,
                        bottom + 2, bottom + 6, at + width / 2, bottom + 14);
                lla_svg_label(out, at + width / 2, bottom + 26, 11, SVG_MIDDLE, SVG_INK, false, text);
                free_x = at + width + 14;
                below = true;
            }
        }
    return bottom + (below ? 32 : 0);
}

/* Draws an enlarged strip under `from`, where y is free; returns where its labels end. */
static double draw_zoom(FILE *out, const struct strip *from, struct strip *s, double y, const struct piece *pieces,
                        size_t count, unsigned mask, unsigned unlabelled, const char *what, const char *id) {
    char caption[128], size[24], times[32];
    double whole = (double)from->nbytes / (double)s->nbytes;
    s->y = y + 70, s->h = 48;
    guides(out, from, s, 27);
    snprintf(caption, sizeof caption, "%s: %s, enlarged %s times", what, lla_render_size(size, s->nbytes),
             lla_render_count(times, (size_t)(whole + 0.5)));
    size_t widest = 0;
    for (size_t i = 1; i < s->n; i++)
        if (s->windows[i].w > s->windows[widest].w) widest = i;
    lla_svg_label(out, s->windows[widest].x + 10, s->y - 9, 12, SVG_START, SVG_INK, false, caption);
    draw_pieces(out, s, pieces, count, mask, id);
    return zoom_labels(out, s, pieces, count, mask & ~unlabelled);
}

/* Three columns of four, read downwards. */
static double legend(FILE *out, const struct lla_plan *plan, const struct piece *pieces, size_t count, size_t padding,
                     double top) {
    size_t bytes[PARTS] = {[PART_PADDING] = padding};
    for (size_t i = 0; i < count; i++) bytes[pieces[i].part] += pieces[i].nbytes;
    for (size_t i = 0; i < PARTS; i++) {
        char size[24], share[24];
        double x = SVG_LEFT + (double)(i / 4) * 386, right = x + 348, y = top + (double)(i % 4) * 25;
        double percent = 100.0 * (double)bytes[i] / (double)plan->total;
        snprintf(share, sizeof share, bytes[i] && percent < 0.005 ? "<0.01%%" : "%.2f%%", percent);
        lla_svg_box(out, x, y - 10, 12, 12, 3, part_look[i].fill, "", NULL);
        lla_svg_label(out, x + 20, y, 13, SVG_START, SVG_INK, false, part_look[i].name);
        if (i == PART_HEAD && plan->spec.tied && !bytes[i]) {
            lla_svg_label(out, right, y, 13, SVG_END, SVG_FAINT, false, "the embedding's bytes");
            continue;
        }
        lla_svg_label(out, right - 62, y, 13, SVG_END, SVG_INK, true, lla_render_size(size, bytes[i]));
        lla_svg_label(out, right, y, 13, SVG_END, SVG_FAINT, false, share);
    }
    return top + 4 * 25 - 10;
}

static lla_status arena_map(FILE *out, const struct lla_plan *plan, size_t padding, double *y) {
    const unsigned small = 1u << PART_TABLE | 1u << PART_STEP | 1u << PART_ACTIVATION, all = (1u << PARTS) - 1;
    struct piece *pieces = calloc(2 * (plan->nregion + 1), sizeof *pieces);
    LLA_REQUIRE(pieces, LLA_ENOMEM, "cannot get memory for the pieces of %zu regions", plan->nregion);
    struct piece *joined = pieces + plan->nregion + 1;
    size_t count = make_pieces(plan, pieces), njoined = join(joined, pieces, count, PART_STEP);

    lla_svg_heading(out, *y, "The arena", "every byte, to scale, in order of offset");
    struct strip arena = {.windows = {{0, plan->total, SVG_LEFT, SVG_RIGHT - SVG_LEFT}}, .n = 1, .nbytes = plan->total};
    arena.y = *y + 46, arena.h = 78;

    struct strip part = {.n = 0}, step = {.n = 0};
    strip_windows(&part, joined, njoined, small);
    if ((double)part.nbytes > 0.25 * (double)plan->total) part.n = 0; /* large enough where it is */
    strip_windows(&step, pieces, count, 1u << PART_STEP);
    const struct strip *parent = part.n ? &part : &arena;
    if ((double)step.nbytes > 0.12 * (double)(part.n ? part.nbytes : plan->total)) step.n = 0;
    const struct piece *shown = step.n ? joined : pieces;
    size_t nshown = step.n ? njoined : count;

    arena_ticks(out, plan, &arena);
    draw_pieces(out, &arena, shown, nshown, all, "arena");
    arena_labels(out, plan, &arena, shown, nshown);
    *y = arena.y + arena.h;
    if (part.n)
        *y = draw_zoom(out, &arena, &part, *y, shown, nshown, small, step.n ? 1u << PART_STEP : 0,
                       "tables, step and activations", "part");
    if (step.n)
        *y = draw_zoom(out, parent, &step, *y, pieces, count, 1u << PART_STEP, 0, "step inputs and outputs", "step");
    *y = legend(out, plan, pieces, count, padding, *y + 38);
    free(pieces);
    return LLA_OK;
}

/* ---- the page ---- */

static void header(FILE *out, const struct lla_plan *plan) {
    const struct lla_spec *s = &plan->spec;
    char text[256], size[24], count[32];
    double params = 0;
    for (size_t i = 0; i < plan->nweight; i++) {
        const struct lla_weight *w = &plan->weights[i];
        if (w->kind != LLA_W_HEAD || !s->tied) params += (double)w->rows * (double)w->cols;
    }
    snprintf(text, sizeof text, "Qwen2 · %zu layers · hidden %zu", s->nlayer, s->hidden);
    lla_svg_label(out, SVG_LEFT, 62, 27, SVG_START, SVG_INK, true, text);
    lla_svg_label(out, SVG_RIGHT, 62, 27, SVG_END, SVG_INK, true, lla_render_size(size, plan->total));
    const char *unit = params >= 1e9 ? "B" : params >= 1e6 ? "M" : "K";
    snprintf(text, sizeof text, "%.3g %s parameters%s",
             params / (*unit == 'B'   ? 1e9
                       : *unit == 'M' ? 1e6
                                      : 1e3),
             unit, plan->shard.degree > 1 ? " on this rank" : "");
    size_t n = strlen(text);
    snprintf(text + n, sizeof text - n, " in %s · %zu query and %zu KV heads of %zu · FFN %zu · vocabulary %s",
             lla_dtype_name(s->dtype), s->nhead, s->nkvhead, s->head_dim, s->ffn, lla_render_count(count, s->vocab));
    lla_svg_label(out, SVG_LEFT, 90, 14, SVG_START, SVG_FAINT, false, text);
    lla_svg_label(out, SVG_RIGHT, 90, 14, SVG_END, SVG_FAINT, false, "in one arena");
    n = (size_t)snprintf(text, sizeof text, "%zu sequence%s of up to %zu tokens", plan->limits.max_seqs,
                         plan->limits.max_seqs == 1 ? "" : "s", plan->limits.max_seq);
    n += (size_t)snprintf(text + n, sizeof text - n, " · %s KV tokens in blocks of %zu · %zu rows a step",
                          lla_render_count(count, plan->limits.kv_tokens), plan->limits.kv_block, plan->max_rows);
    lla_svg_label(out, SVG_LEFT, 112, 14, SVG_START, SVG_FAINT, false, text);
    snprintf(text, sizeof text, "rank %zu of %zu", plan->shard.rank, plan->shard.degree);
    if (plan->shard.degree > 1) lla_svg_label(out, SVG_RIGHT, 112, 14, SVG_END, SVG_FAINT, false, text);
}

lla_status lla_plan_render_svg(const struct lla_plan *plan, FILE *out) {
    size_t bytes[RENDER_CLASSES], nbody = 0;
    char *body = NULL, size[24];
    LLA_TRY(lla_render_totals(plan, bytes));
    LLA_REQUIRE(plan->total, LLA_EINVAL, "an empty plan has no picture");
    FILE *memory = open_memstream(&body, &nbody); /* the page's height is known when it is drawn */
    LLA_REQUIRE(memory, LLA_ENOMEM, "cannot get memory for the picture");
    double y = 160;
    header(memory, plan);
    lla_status status = arena_map(memory, plan, bytes[RENDER_PADDING], &y);
    y += 62;
    if (!status) status = lla_plan_render_lifetimes(memory, plan, &y);
    if (fclose(memory) && !status) status = lla_fail(LLA_ENOMEM, "cannot get memory for the picture");
    if (!status) {
        double height = y + 36;
        fprintf(
            out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %.0f\" role=\"img\" aria-label=\"Memory plan: "
            "an arena of %s\" font-family=\"Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif\">\n",
            SVG_PAGE, height, lla_render_size(size, plan->total));
        lla_svg_box(out, 1, 1, SVG_PAGE - 2, height - 2, 18, SVG_PAPER, "stroke=\"" SVG_LINE "\"", NULL);
        fwrite(body, 1, nbody, out);
        fputs("</svg>\n", out);
    }
    free(body);
    return status;
}
