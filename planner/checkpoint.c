/* checkpoint.c: a model folder's shards, mapped and merged into one table of tensors. */
#include "json.h"
#include "safetensors.h"

#include <cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define INDEX_NAME "model.safetensors.index.json"
#define SINGLE_NAME "model.safetensors"
#define SUFFIX ".safetensors"

enum { INDEX_LIMIT = 100 * 1000000 };

struct shard {
    void *bytes; /* the mapping, NULL for an empty file */
    size_t nbytes;
    struct lla_st_index index;
};

struct lla_checkpoint {
    struct shard *shards;
    size_t nshard;
    struct lla_st_tensor *tensors; /* of all shards, sorted by name */
    size_t count;
};

/* ---- which files ---- */

struct names {
    char **items;
    size_t count, room;
};

static lla_status names_add(struct names *names, const char *name) {
    if (names->count == names->room) {
        size_t room = names->room ? 2 * names->room : 16;
        char **items = realloc(names->items, room * sizeof *items);
        LLA_REQUIRE(items, LLA_ENOMEM, "%s: out of memory for the list of shards", name);
        names->items = items;
        names->room = room;
    }
    names->items[names->count] = strdup(name);
    LLA_REQUIRE(names->items[names->count], LLA_ENOMEM, "%s: out of memory for the list of shards", name);
    names->count++;
    return LLA_OK;
}

static void names_free(struct names *names) {
    for (size_t i = 0; i < names->count; i++) free(names->items[i]);
    free(names->items);
    memset(names, 0, sizeof *names);
}

static int compare_names(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Sorted, each once. */
static void names_unique(struct names *names) {
    if (!names->count) return;
    qsort(names->items, names->count, sizeof *names->items, compare_names);
    size_t kept = 1;
    for (size_t i = 1; i < names->count; i++) {
        if (strcmp(names->items[i], names->items[kept - 1]))
            names->items[kept++] = names->items[i];
        else
            free(names->items[i]);
    }
    names->count = kept;
}

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

/* A shard's name as an index gives it may not lead out of the folder. */
static bool is_plain_name(const char *name) {
    if (!*name || *name == '.' || strlen(name) > 255) return false;
    for (const char *c = name; *c; c++)
        if (*c == '/' || *c == '\\' || (uint8_t)*c < 0x20 || *c == 0x7f) return false;
    return ends_with(name, SUFFIX);
}

/* Shards named by an index's {"weight_map": {tensor: file, ...}}. */
static lla_status names_from_index(const cJSON *root, const cJSON **weight_map, struct names *names) {
    char shown[LLA_SHOWN], tensor[LLA_SHOWN];
    LLA_REQUIRE(cJSON_IsObject(root), LLA_EFORMAT, INDEX_NAME ": expected a JSON object, found %s",
                lla_json_show(root, shown));
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(root, "weight_map");
    LLA_REQUIRE(cJSON_IsObject(map), LLA_EFORMAT,
                INDEX_NAME ": weight_map: expected an object of tensor names and file names, found %s",
                lla_json_show(map, shown));
    LLA_REQUIRE(map->child, LLA_EFORMAT, INDEX_NAME ": weight_map: expected at least one tensor, found none");
    const char *last = "";
    for (const cJSON *item = map->child; item; item = item->next) {
        LLA_REQUIRE(cJSON_IsString(item), LLA_EFORMAT, INDEX_NAME ": tensor '%s': expected a file name, found %s",
                    lla_clip(item->string, tensor), lla_json_show(item, shown));
        LLA_REQUIRE(is_plain_name(item->valuestring), LLA_EFORMAT,
                    INDEX_NAME ": tensor '%s': expected the name of a " SUFFIX " file in the same folder, found %s",
                    lla_clip(item->string, tensor), lla_json_show(item, shown));
        if (!strcmp(item->valuestring, last)) continue; /* runs of one shard are the rule */
        LLA_TRY(names_add(names, item->valuestring));
        last = item->valuestring;
    }
    names_unique(names);
    *weight_map = map;
    return LLA_OK;
}

/* Without an index: model.safetensors, else every *.safetensors of the folder. */
static lla_status names_from_folder(const char *dir, struct names *names) {
    char shown[LLA_SHOWN];
    bool has_single = false, has_pickle = false;
    DIR *folder = opendir(dir);
    LLA_REQUIRE(folder, LLA_EIO, "model folder '%s': cannot be read: %s", lla_clip(dir, shown), strerror(errno));
    lla_status status = LLA_OK;
    for (const struct dirent *entry; !status && (entry = readdir(folder));) {
        has_single |= !strcmp(entry->d_name, SINGLE_NAME);
        has_pickle |= !strncmp(entry->d_name, "pytorch_model", 13) && strstr(entry->d_name, ".bin");
        if (entry->d_name[0] != '.' && ends_with(entry->d_name, SUFFIX)) status = names_add(names, entry->d_name);
    }
    closedir(folder);
    LLA_TRY(status);
    if (has_single) {
        names_free(names);
        return names_add(names, SINGLE_NAME);
    }
    LLA_REQUIRE(names->count, LLA_EIO,
                "model folder '%s': expected " INDEX_NAME ", " SINGLE_NAME " or another *" SUFFIX ", found %s",
                lla_clip(dir, shown),
                has_pickle ? "only pytorch_model*.bin: convert it to safetensors first" : "none of them");
    names_unique(names);
    return LLA_OK;
}

/* ---- the checkpoint ---- */

static lla_status shard_open(const char *dir, const char *name, bool from_index, struct shard *shard) {
    char shown[LLA_SHOWN];
    int fd;
    LLA_TRY(lla_open_file(dir, name, &fd, &shard->nbytes));
    LLA_REQUIRE(fd >= 0, LLA_EIO, "%s: %sexpected in folder '%s', found no such file", name,
                from_index ? "named by " INDEX_NAME ", " : "", lla_clip(dir, shown));
    if (shard->nbytes) { /* mmap refuses 0 bytes */
        void *bytes = mmap(NULL, shard->nbytes, PROT_READ, MAP_PRIVATE, fd, 0);
        int error = errno;
        close(fd);
        LLA_REQUIRE(bytes != MAP_FAILED, LLA_EIO, "%s: %zu bytes cannot be mapped: %s", name, shard->nbytes,
                    strerror(error));
        shard->bytes = bytes;
        (void)madvise(bytes, shard->nbytes, MADV_SEQUENTIAL); /* weights are copied once, front to back; only a hint */
    } else
        close(fd);
    static const uint8_t nothing[1];
    return lla_st_parse(shard->bytes ? shard->bytes : nothing, shard->nbytes, name, &shard->index);
}

static int compare_tensors(const void *a, const void *b) {
    return strcmp(((const struct lla_st_tensor *)a)->name, ((const struct lla_st_tensor *)b)->name);
}

/* One sorted table of all shards' tensors; refuses a name that two shards hold. */
static lla_status merge(struct lla_checkpoint *checkpoint) {
    char name[LLA_SHOWN];
    size_t count = 0;
    for (size_t i = 0; i < checkpoint->nshard; i++) count += checkpoint->shards[i].index.count;
    checkpoint->tensors = calloc(count + 1, sizeof *checkpoint->tensors);
    LLA_REQUIRE(checkpoint->tensors, LLA_ENOMEM, "out of memory for a table of %zu tensors", count);
    for (size_t i = 0; i < checkpoint->nshard; i++) {
        const struct lla_st_index *index = &checkpoint->shards[i].index;
        memcpy(checkpoint->tensors + checkpoint->count, index->tensors, index->count * sizeof *index->tensors);
        checkpoint->count += index->count;
    }
    qsort(checkpoint->tensors, count, sizeof *checkpoint->tensors, compare_tensors);
    for (size_t i = 1; i < count; i++) {
        const struct lla_st_tensor *a = &checkpoint->tensors[i - 1], *b = &checkpoint->tensors[i];
        LLA_REQUIRE(strcmp(a->name, b->name), LLA_EFORMAT, "%s: tensor '%s': expected in one file, found in %s too",
                    a->file, lla_clip(a->name, name), b->file);
    }
    return LLA_OK;
}

/* Every tensor that the index lists must be in the shard that the index says. */
static lla_status check_listing(const struct lla_checkpoint *checkpoint, const cJSON *weight_map) {
    char name[LLA_SHOWN];
    for (const cJSON *item = weight_map->child; item; item = item->next) {
        const struct lla_st_tensor *tensor = lla_checkpoint_find(checkpoint, item->string);
        LLA_REQUIRE(tensor && !strcmp(tensor->file, item->valuestring), LLA_EFORMAT,
                    INDEX_NAME ": tensor '%s': expected in %s, found %s%s", lla_clip(item->string, name),
                    item->valuestring, tensor ? "in " : "nowhere", tensor ? tensor->file : "");
    }
    return LLA_OK;
}

lla_status lla_checkpoint_open(const char *dir, struct lla_checkpoint **out) {
    char shown[LLA_SHOWN], *text = NULL;
    size_t nbytes = 0;
    struct stat info;
    struct names names = {0};
    cJSON *root = NULL;
    const cJSON *weight_map = NULL;
    struct lla_checkpoint *checkpoint = NULL;
    lla_status status = LLA_OK;

    *out = NULL;
    LLA_REQUIRE(!stat(dir, &info), LLA_EIO, "model folder '%s': %s", lla_clip(dir, shown), strerror(errno));
    LLA_REQUIRE(S_ISDIR(info.st_mode), LLA_EIO, "model folder '%s': expected a folder, found a file",
                lla_clip(dir, shown));
    LLA_TRY(lla_read_file(dir, INDEX_NAME, INDEX_LIMIT, &text, &nbytes));
    if (text) {
        LLA_TRY_GOTO(status, lla_json_parse(text, nbytes, INDEX_NAME, &root), done);
        LLA_TRY_GOTO(status, names_from_index(root, &weight_map, &names), done);
    } else
        LLA_TRY_GOTO(status, names_from_folder(dir, &names), done);

    checkpoint = calloc(1, sizeof *checkpoint);
    if (checkpoint) checkpoint->shards = calloc(names.count, sizeof *checkpoint->shards);
    if (!checkpoint || !checkpoint->shards) {
        status = lla_fail(LLA_ENOMEM, "out of memory for %zu shards", names.count);
        goto done;
    }
    for (; checkpoint->nshard < names.count; checkpoint->nshard++) {
        struct shard *shard = &checkpoint->shards[checkpoint->nshard];
        status = shard_open(dir, names.items[checkpoint->nshard], weight_map != NULL, shard);
        if (!status) continue;
        checkpoint->nshard++; /* the failing one may be mapped */
        goto done;
    }
    LLA_TRY_GOTO(status, merge(checkpoint), done);
    if (weight_map) LLA_TRY_GOTO(status, check_listing(checkpoint, weight_map), done);
    *out = checkpoint;

done:
    if (status) lla_checkpoint_close(checkpoint);
    cJSON_Delete(root);
    names_free(&names);
    free(text);
    return status;
}

void lla_checkpoint_close(struct lla_checkpoint *checkpoint) {
    if (!checkpoint) return;
    for (size_t i = 0; i < checkpoint->nshard; i++) {
        lla_st_index_free(&checkpoint->shards[i].index);
        if (checkpoint->shards[i].bytes) munmap(checkpoint->shards[i].bytes, checkpoint->shards[i].nbytes);
    }
    free(checkpoint->shards);
    free(checkpoint->tensors);
    free(checkpoint);
}

const struct lla_st_tensor *lla_checkpoint_find(const struct lla_checkpoint *checkpoint, const char *name) {
    struct lla_st_tensor key = {.name = name};
    return bsearch(&key, checkpoint->tensors, checkpoint->count, sizeof key, compare_tensors);
}

size_t lla_checkpoint_count(const struct lla_checkpoint *checkpoint) {
    return checkpoint->count;
}

const struct lla_st_tensor *lla_checkpoint_at(const struct lla_checkpoint *checkpoint, size_t i) {
    return i < checkpoint->count ? &checkpoint->tensors[i] : NULL;
}
