/* safetensors.h: reads checkpoints in the safetensors format (https://github.com/huggingface/safetensors), mapped,
 * never copied.
 *
 * Every defect of a file is an error whose one line names the file and, where there is one, the tensor. */
#ifndef LLA_SAFETENSORS_H
#define LLA_SAFETENSORS_H

#include "../base/dtype.h"
#include "../base/status.h"

enum { LLA_ST_MAX_NDIM = 8 };

struct lla_st_tensor {
    const char *name;
    llaisysDataType_t dtype; /* F8 for both F8_E4M3 and F8_E5M2, which the engine does not compute with */
    size_t ndim;
    size_t shape[LLA_ST_MAX_NDIM];
    const void *data; /* nbytes of the mapping, row-major; not necessarily aligned */
    size_t nbytes;
    const char *file; /* base name of the shard, for messages */
};

/* The tensors of one safetensors image, sorted by name. Owns the names, not the bytes. */
struct lla_st_index {
    struct lla_st_tensor *tensors;
    size_t count;
    char *file;  /* what tensors[i].file points to */
    void *names; /* storage of the names */
};

/* Parses the image bytes [nbytes], checking every rule of the format: header length, UTF-8, JSON, known dtypes, shape
 * products, offsets that cover the data section exactly with neither holes nor overlaps, no duplicate names. `file`
 * names it in errors. On failure *out is empty. */
lla_status lla_st_parse(const uint8_t *bytes, size_t nbytes, const char *file, struct lla_st_index *out);
void lla_st_index_free(struct lla_st_index *index);

/* A model folder's weights: model.safetensors.index.json with its shards, else model.safetensors, else every
 * *.safetensors there. The tensors' bytes stay valid until the checkpoint is closed, as long as nobody shortens the
 * files. */
struct lla_checkpoint;
lla_status lla_checkpoint_open(const char *dir, struct lla_checkpoint **out);
void lla_checkpoint_close(struct lla_checkpoint *checkpoint); /* NULL is allowed */
/* NULL where there is no such tensor. The result lives as long as the checkpoint. */
const struct lla_st_tensor *lla_checkpoint_find(const struct lla_checkpoint *checkpoint, const char *name);
/* Number of tensors, and the i-th in order of names. */
size_t lla_checkpoint_count(const struct lla_checkpoint *checkpoint);
const struct lla_st_tensor *lla_checkpoint_at(const struct lla_checkpoint *checkpoint, size_t i);

#endif
