/* device.h: finding a device type's table, and working on a device.
 *
 * Code of the engine that works on a device for its caller brackets
 * the work with lla_device_enter() and lla_device_leave(), so that the caller's current device stays what it was. */
#ifndef LLA_ENGINE_DEVICE_H
#define LLA_ENGINE_DEVICE_H

#include "../kernels/device.h"

/* The table of a device type; never NULL: for an unknown type, one that has no devices and whose calls fail. */
const struct lla_device *lla_device_get(llaisysDeviceType_t type);

/* The operators of a device type, or NULL with a message. */
const struct lla_op_table *lla_device_ops(llaisysDeviceType_t type);

/* Makes device `id` of a type the thread's current one. */
lla_status lla_device_select(llaisysDeviceType_t type, int id);

struct lla_device_scope {
    const struct lla_device *device;
    int previous;
};

/* As lla_device_select, remembering the previous device for lla_device_leave, which is called only after success. */
lla_status lla_device_enter(struct lla_device_scope *scope, llaisysDeviceType_t type, int id);
/* Keeps the thread's message: it tells of the work inside the scope. */
void lla_device_leave(const struct lla_device_scope *scope);

#endif
