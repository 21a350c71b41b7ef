/* render.h: what the files that render a plan share: numbers as people read them, and the shapes of the picture. */
#ifndef LLA_RENDER_H
#define LLA_RENDER_H

#include "plan.h"

/* Classes of bytes: the kinds of regions, and what alignment adds. */
enum { RENDER_PADDING = LLA_R_ACTIVATION + 1, RENDER_CLASSES };

/* "89.3 MiB", three digits and a bit, in binary units; "3,554,176,256". Both return out. */
const char *lla_render_size(char out[24], size_t nbytes);
const char *lla_render_count(char out[32], size_t value);
/* Bytes of each class, which sum to the arena; refuses a plan whose regions do not fit in it. */
lla_status lla_render_totals(const struct lla_plan *plan, size_t bytes[RENDER_CLASSES]);

/* ---- the picture ---- */

enum { SVG_PAGE = 1200, SVG_LEFT = 40, SVG_RIGHT = SVG_PAGE - SVG_LEFT };

#define SVG_INK "#1f2937"
#define SVG_FAINT "#6b7280"
#define SVG_LINE "#d7dce3"
#define SVG_PAPER "#fcfcfd"
#define SVG_ACTIVATION "#dd6b52"

lla_status lla_plan_render_svg(const struct lla_plan *plan, FILE *out);
/* Draws from *y down and moves *y to where the drawing ends. */
lla_status lla_plan_render_lifetimes(FILE *out, const struct lla_plan *plan, double *y);

enum lla_svg_anchor { SVG_START, SVG_MIDDLE, SVG_END };

/* An upper bound of the width of text in common sans-serif faces, so that what is said to fit does in all of them. */
double lla_svg_text_width(const char *text, double size, bool bold);
void lla_svg_label(FILE *out, double x, double y, double size, enum lla_svg_anchor anchor, const char *fill, bool bold,
                   const char *text);
/* A section's title, and more about it in smaller letters. */
void lla_svg_heading(FILE *out, double y, const char *title, const char *more);
/* A rectangle whose tooltip is title, if any; the caller's `more` are further attributes. */
void lla_svg_box(FILE *out, double x, double y, double w, double h, double radius, const char *fill, const char *more,
                 const char *title);
void lla_svg_line(FILE *out, double x0, double y0, double x1, double y1, const char *stroke, const char *more);

#endif
