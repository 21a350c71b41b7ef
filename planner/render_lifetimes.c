/* render_lifetimes.c: the part of the picture that shows which activation lives over which nodes of a step, and where
 * in the shared bytes. */
#include "render.h"

#include <stdlib.h>

/* Fill and edge of the buffers in the picture of lifetimes. */
static const char *const buffer_look[][2] = {
    {"#fde4dd", "#d2583f"}, {"#dbe7fb", "#3f6fbf"}, {"#fcedcd", "#c08a1e"}, {"#d5efeb", "#1f8a80"},
    {"#e9e1f7", "#7d5fbd"}, {"#dfefdc", "#4f9655"}, {"#fadfe9", "#bf4f7c"}, {"#e4e8ef", "#64748b"},
    {"#d9eef5", "#2c87a8"}, {"#f0ebdc", "#8f7a3d"},
};

/* Bold text cut with an ellipsis to fit in width; false where not even three letters do. */
static bool fit(char out[LLA_NAME + 4], const char *text, double size, double width) {
    snprintf(out, LLA_NAME, "%s", text);
    for (size_t n = strlen(out); lla_svg_text_width(out, size, true) > width;) {
        do n--;
        while (n > 3 && ((unsigned char)out[n] & 0xc0) == 0x80);
        if (n < 3) return false;
        memcpy(out + n, "…", sizeof "…");
    }
    return true;
}

/* The chart's axes: nodes to the right, bytes of the activations downwards. Heights are to scale but for small buffers,
 * which are raised until their names can be read; buffers that share bytes share heights all the same. */
struct chart {
    const struct lla_region **buffers; /* [n] */
    size_t n, nnode;
    size_t *edges; /* [nedge] where a buffer begins or ends, ascending */
    double *tops;  /* [nedge] */
    size_t nedge;
    double x, w, y, h;
};

static bool drawn(const struct lla_region *r) {
    return r->kind == LLA_R_ACTIVATION && r->nbytes && r->first <= r->last;
}

static int size_order(const void *a, const void *b) {
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return (x > y) - (x < y);
}

static int buffer_order(const void *a, const void *b) {
    const struct lla_region *x = *(const struct lla_region *const *)a, *y = *(const struct lla_region *const *)b;
    return (x->nbytes > y->nbytes) - (x->nbytes < y->nbytes);
}

static size_t edge_of(const struct chart *c, size_t offset) {
    return (size_t)((size_t *)bsearch(&offset, c->edges, c->nedge, sizeof *c->edges, size_order) - c->edges);
}

static void chart_scale(struct chart *c) {
    const double target = 400, least = c->n <= 14 ? 34 : 22;
    size_t m = 0;
    for (size_t i = 0; i < c->n; i++) {
        c->edges[m++] = c->buffers[i]->offset;
        c->edges[m++] = c->buffers[i]->offset + c->buffers[i]->nbytes;
    }
    qsort(c->edges, m, sizeof *c->edges, size_order);
    c->nedge = 0;
    for (size_t i = 0; i < m; i++)
        if (!i || c->edges[i] != c->edges[c->nedge - 1]) c->edges[c->nedge++] = c->edges[i];
    double span = (double)(c->edges[c->nedge - 1] - c->edges[0]);
    for (size_t i = 0; i + 1 < c->nedge; i++)
        c->tops[i] = 0.5 + target * (double)(c->edges[i + 1] - c->edges[i]) / span;
    qsort(c->buffers, c->n, sizeof *c->buffers, buffer_order);
    for (size_t i = 0; i < c->n; i++) { /* smallest first: tops still holds heights */
        size_t first = edge_of(c, c->buffers[i]->offset),
               end = edge_of(c, c->buffers[i]->offset + c->buffers[i]->nbytes);
        double height = 0;
        for (size_t k = first; k < end; k++) height += c->tops[k];
        for (size_t k = first; k < end && height < least; k++) c->tops[k] *= least / height;
    }
    c->h = 0;
    for (size_t i = 0; i < c->nedge; i++) {
        double height = i + 1 < c->nedge ? c->tops[i] : 0;
        c->tops[i] = c->h;
        c->h += height;
    }
}

static double node_x(const struct chart *c, size_t node) {
    return c->x + c->w * (double)(node < c->nnode ? node : c->nnode) / (double)c->nnode;
}

static void chart_columns(FILE *out, const struct lla_plan *plan, const struct chart *c, double bottom) {
    if (plan->repeat > 1 && plan->repeat_last >= plan->repeat_first && plan->repeat_last < c->nnode) {
        char text[64];
        double x = node_x(c, plan->repeat_first), w = node_x(c, plan->repeat_last + 1) - x;
        lla_svg_box(out, x, c->y - 54, w, bottom - c->y + 54, 10, "#eef3fb", "", NULL);
        snprintf(text, sizeof text, "layer × %zu", plan->repeat);
        lla_svg_label(out, x + w / 2, c->y - 36, 12, SVG_MIDDLE, "#3f6fbf", true, text);
    }
    double free_x = 0;
    for (size_t i = 0; i < c->nnode; i++) {
        char text[LLA_NAME];
        if (plan->node_names)
            snprintf(text, sizeof text, "%s", plan->node_names[i]);
        else
            snprintf(text, sizeof text, "%zu", i);
        double x = node_x(c, i), middle = (x + node_x(c, i + 1)) / 2, width = lla_svg_text_width(text, 12, true);
        if (i && c->w / (double)c->nnode > 6)
            lla_svg_line(out, x, c->y - 6, x, bottom, SVG_LINE, "stroke-dasharray=\"2 4\"");
        if (middle - width / 2 < free_x || middle + width / 2 > SVG_RIGHT + 10) continue;
        lla_svg_label(out, middle, c->y - 14, 12, SVG_MIDDLE, SVG_INK, true, text);
        free_x = middle + width / 2 + 8;
    }
}

static void chart_buffer(FILE *out, const struct lla_plan *plan, const struct chart *c, const struct lla_region *r,
                         const char *const look[2]) {
    char title[400], name[LLA_NAME + 4], size[24], count[32], detail[LLA_NAME + 32];
    double inset = c->w / (double)c->nnode > 14 ? 3 : 0.3;
    double x = node_x(c, r->first) + inset, w = node_x(c, r->last + 1) - inset - x;
    double y = c->y + c->tops[edge_of(c, r->offset)] + 1, h = c->y + c->tops[edge_of(c, r->offset + r->nbytes)] - 1 - y;
    lla_render_size(size, r->nbytes);
    snprintf(title, sizeof title, "%s %s: %s (%s bytes) at 0x%zx, nodes %zu to %zu%s", r->name, r->shape, size,
             lla_render_count(count, r->nbytes), r->offset, r->first, r->last,
             r->first == 0 && r->last + 1 >= plan->nnode ? ", the whole step" : "");
    char stroke[64];
    snprintf(stroke, sizeof stroke, "stroke=\"%s\"", look[1]);
    if (w < 0.5) w = 0.5;
    lla_svg_box(out, x, y, w, h, w > 14 ? 6 : 1, look[0], stroke, title);
    if (w > 24 && h > 16) lla_svg_box(out, x + 5, y + 5, 3, h - 10, 1.5, look[1], "pointer-events=\"none\"", NULL);

    double room = w - 21, text_x = x + 14, middle = y + h / 2, font = 12;
    if (lla_svg_text_width(r->name, font, true) > room) font = 11;
    if (h < 15 || !fit(name, r->name, font, room)) return;
    snprintf(detail, sizeof detail, "%s   %s", size, r->shape);
    double name_w = lla_svg_text_width(name, font, true) + 8;
    bool two = h >= 30 && lla_svg_text_width(size, 11, false) <= room;
    if (!two) room -= name_w, text_x += name_w;
    const char *second = lla_svg_text_width(detail, 11, false) <= room ? detail : size;
    lla_svg_label(out, two ? text_x : text_x - name_w, two ? middle - 3.5 : middle + 4, font, SVG_START, SVG_INK, true,
                  name);
    if (lla_svg_text_width(second, 11, false) <= room)
        lla_svg_label(out, text_x, two ? middle + 10.5 : middle + 4, 11, SVG_START, SVG_FAINT, false, second);
}

/* Under the chart: the bytes in use at each node. */
static void chart_live(FILE *out, const struct chart *c, double y) {
    size_t peak = 0;
    lla_svg_label(out, c->x - 12, y + 22, 12, SVG_END, SVG_INK, true, "in use");
    for (int pass = 0; pass < 2; pass++)
        for (size_t node = 0; node < c->nnode; node++) {
            size_t live = 0;
            char size[24];
            for (size_t i = 0; i < c->n; i++)
                if (c->buffers[i]->first <= node && node <= c->buffers[i]->last) live += c->buffers[i]->nbytes;
            if (!pass) {
                if (live > peak) peak = live;
                continue;
            }
            double x = node_x(c, node), w = node_x(c, node + 1) - x, inset = w > 14 ? 6 : 0.3;
            double most = w - 2 * inset, share = peak ? (double)live / (double)peak : 0;
            lla_render_size(size, live);
            lla_svg_box(out, x + inset, y + 26, most, 6, w > 14 ? 3 : 0, "#e5e7eb", "", size);
            lla_svg_box(out, x + inset, y + 26, most * share, 6, w > 14 ? 3 : 0,
                        live == peak ? SVG_ACTIVATION : "#94a3b8", "pointer-events=\"none\"", NULL);
            if (lla_svg_text_width(size, 11, false) <= w)
                lla_svg_label(out, x + w / 2, y + 20, 11, SVG_MIDDLE, live == peak ? "#b0452e" : SVG_FAINT,
                              live == peak, size);
        }
}

static void chart_axis(FILE *out, const struct chart *c) {
    double free_y = -20;
    char at[24];
    for (size_t i = 0; i < c->nedge; i++) { /* the end first in right: its label matters most */
        bool last = i + 1 == c->nedge;
        if (!last && (c->tops[i] < free_y || c->h - c->tops[i] < 15)) continue;
        lla_render_size(at, c->edges[i] - c->edges[0]);
        double y = c->y + c->tops[i];
        lla_svg_line(out, c->x - 6, y, c->x + c->w, y, SVG_LINE, "");
        lla_svg_label(out, c->x - 12, y + 4, 11, SVG_END, SVG_FAINT, last, i ? at : "0");
        free_y = c->tops[i] + 15;
    }
}

lla_status lla_plan_render_lifetimes(FILE *out, const struct lla_plan *plan, double *y) {
    struct chart c = {.nnode = plan->nnode ? plan->nnode : 1, .x = SVG_LEFT + 84, .w = SVG_RIGHT - SVG_LEFT - 84};
    lla_status status = LLA_OK;
    c.buffers = calloc(plan->nregion + 1, sizeof *c.buffers);
    c.edges = calloc(2 * plan->nregion + 1, sizeof *c.edges);
    c.tops = calloc(2 * plan->nregion + 1, sizeof *c.tops);
    if (!c.buffers || !c.edges || !c.tops) {
        status = lla_fail(LLA_ENOMEM, "cannot get memory for the lifetimes of %zu regions", plan->nregion);
        goto done;
    }
    for (size_t i = 0; i < plan->nregion; i++) {
        const struct lla_region *r = &plan->regions[i];
        if (drawn(r)) c.buffers[c.n++] = r;
    }
    if (!c.n) goto done;

    char text[160], sum[24], overlaid[24];
    size_t saved = plan->activation_sum > plan->activation_bytes ? plan->activation_sum - plan->activation_bytes : 0;
    snprintf(text, sizeof text, "buffers of %s in %s: %.0f%% saved where lifetimes do not meet",
             lla_render_size(sum, plan->activation_sum), lla_render_size(overlaid, plan->activation_bytes),
             plan->activation_sum ? 100.0 * (double)saved / (double)plan->activation_sum : 0.0);
    lla_svg_heading(out, *y, "Activations over a step", text);
    chart_scale(&c);
    c.y = *y + 74;
    double bottom = c.y + c.h + 52;
    chart_columns(out, plan, &c, bottom);
    chart_axis(out, &c);
    for (size_t i = 0, k = 0; i < plan->nregion; i++) { /* in order of offset, so that neighbours differ in colour */
        const struct lla_region *r = &plan->regions[i];
        if (drawn(r)) chart_buffer(out, plan, &c, r, buffer_look[k++ % (sizeof buffer_look / sizeof *buffer_look)]);
    }
    chart_live(out, &c, c.y + c.h + 8);
    *y = bottom;
done:
    free(c.buffers);
    free(c.edges);
    free(c.tops);
    return status;
}
