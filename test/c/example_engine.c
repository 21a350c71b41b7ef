/* example_engine.c: the example at the end of llaisys/engine.h, as it stands there. */
#define LLAISYS_ENGINE_EXAMPLE
#include <llaisys/engine.h>
