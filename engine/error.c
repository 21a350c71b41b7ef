#include "../base/status.h"
#include "../include/llaisys.h"

const char *llaisysGetLastError(void) {
    return lla_last_error();
}
