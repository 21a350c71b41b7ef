/* qwen2.h: a Qwen2-architecture model as one sequence: create or open, infer, reset, destroy.
 *
 * Ownership: ModelCreate and ModelOpen return a model that the caller destroys. Weights and their tensor handles belong
 * to the model. All memory is taken when the model is created: inference allocates nothing. Units: tokens are
 * vocabulary ids; maxseq counts tokens of the sequence, prompt and answer together. Errors: NULL, -1 or a non-zero
 * status, and llaisysGetLastError() says what was expected and what was found. A failed call leaves the sequence as it
 * was. Threads: a model is used by one thread at a time; different models are independent.
 *
 *     struct LlaisysQwen2Model *m = llaisysQwen2ModelOpen("models/refrain-mini", NULL);
 *     if (!m) { fprintf(stderr, "%s\n", llaisysGetLastError()); return 1; }
 *     int64_t prompt[3] = {1, 2, 3};
 *     int64_t token = llaisysQwen2ModelInfer(m, prompt, 3);        // prefill, greedy
 *     while (token >= 0 && !llaisysQwen2ModelIsEnd(m, token))
 *         token = llaisysQwen2ModelInfer(m, &token, 1);            // decode
 *     llaisysQwen2ModelDestroy(m);
 */
#ifndef LLAISYS_MODELS_QWEN2_H
#define LLAISYS_MODELS_QWEN2_H

#include "../tensor.h"

LLAISYS_BEGIN

struct LlaisysQwen2Meta {
    llaisysDataType_t dtype;                          /* BF16, F16 or F32 */
    size_t nlayer, hs, nh, nkvh, dh, di, maxseq, voc; /* hs: hidden size; dh: head_dim; di: FFN size */
    float epsilon, theta;
    int64_t end_token; /* -1 for none */
};

/* Row-major weights, all of the model's dtype: in_embed, out_embed [voc, hs]; norms [hs]; q [nh*dh, hs], k and v
 * [nkvh*dh, hs] with biases [rows]; o [hs, nh*dh]; gate, up [di, hs]; down [hs, di]. The arrays hold nlayer handles.
 * Fill them with tensorLoad. */
struct LlaisysQwen2Weights {
    llaisysTensor_t in_embed;
    llaisysTensor_t out_embed;
    llaisysTensor_t out_norm_w;
    llaisysTensor_t *attn_norm_w;
    llaisysTensor_t *attn_q_w;
    llaisysTensor_t *attn_q_b;
    llaisysTensor_t *attn_k_w;
    llaisysTensor_t *attn_k_b;
    llaisysTensor_t *attn_v_w;
    llaisysTensor_t *attn_v_b;
    llaisysTensor_t *attn_o_w;
    llaisysTensor_t *mlp_norm_w;
    llaisysTensor_t *mlp_gate_w;
    llaisysTensor_t *mlp_up_w;
    llaisysTensor_t *mlp_down_w;
};

struct LlaisysQwen2Model;

/* A model with zeroed weights on `ndevice` devices; more than one means tensor parallel. device_ids may be NULL for
 * device 0. */
LLAISYS_API struct LlaisysQwen2Model *llaisysQwen2ModelCreate(const struct LlaisysQwen2Meta *meta,
                                                              llaisysDeviceType_t device, int *device_ids, int ndevice);
LLAISYS_API void llaisysQwen2ModelDestroy(struct LlaisysQwen2Model *model);
LLAISYS_API struct LlaisysQwen2Weights *llaisysQwen2ModelWeights(struct LlaisysQwen2Model *model);

/* Appends token_ids [ntoken], ntoken > 0, to the sequence and returns the greedy next token (which is not appended), or
 * -1. */
LLAISYS_API int64_t llaisysQwen2ModelInfer(struct LlaisysQwen2Model *model, int64_t *token_ids, size_t ntoken);

/* ---- beyond LLAISYS ---- */

/* How a model folder is opened; zero in a field means its default. */
struct LlaisysQwen2Options {
    llaisysDeviceType_t device;
    const int *device_ids;   /* [ndevice]; NULL: device 0 */
    int ndevice;             /* 0: 1 */
    llaisysDataType_t dtype; /* INVALID: the checkpoint's */
    size_t maxseq;           /* tokens; 0: the smaller of the model's context and 4096 */
    size_t prefill_chunk;    /* tokens of a prompt computed at once; 0: 512, on a GPU 2048 */
    int nthread;             /* CPU threads; 0: all cores that the process may use */
    int progress;            /* 1: a progress bar on standard error where that is a terminal */
};

/* How the next token is chosen. temperature 0 or top_k 1: the greedy token, the first of equals. Otherwise, as in
 * transformers: logits / temperature, the top_k largest (0: all), then the smallest set whose probability reaches top_p
 * (1: all). The random number is Philox4x32-10 of (seed, position): same seed and prompt, same text. */
struct LlaisysSampling {
    float temperature; /* >= 0 */
    int32_t top_k;     /* >= 0 */
    float top_p;       /* 0 < top_p <= 1 */
    uint64_t seed;
};

/* Opens a folder in transformers' format: config.json, *.safetensors, generation_config.json. options may be NULL. */
LLAISYS_API struct LlaisysQwen2Model *llaisysQwen2ModelOpen(const char *path,
                                                            const struct LlaisysQwen2Options *options);

/* As ModelInfer, sampled; sampling NULL means greedy. */
LLAISYS_API int64_t llaisysQwen2ModelStep(struct LlaisysQwen2Model *model, const int64_t *token_ids, size_t ntoken,
                                          const struct LlaisysSampling *sampling);
/* Empties the sequence, keeping the weights. */
LLAISYS_API void llaisysQwen2ModelReset(struct LlaisysQwen2Model *model);
/* Tokens in the sequence now. */
LLAISYS_API size_t llaisysQwen2ModelLength(const struct LlaisysQwen2Model *model);
/* Logits of the last step's last token as f32 into logits [voc]; 0, or non-zero before the first step. */
LLAISYS_API int llaisysQwen2ModelLogits(struct LlaisysQwen2Model *model, float *logits);
/* 1 if the token ends a text: one of the end tokens of config.json and generation_config.json. */
LLAISYS_API int llaisysQwen2ModelIsEnd(const struct LlaisysQwen2Model *model, int64_t token);
/* The model's dimensions; maxseq is the one in force. */
LLAISYS_API void llaisysQwen2ModelMeta(const struct LlaisysQwen2Model *model, struct LlaisysQwen2Meta *meta);
/* The plan of a model folder under the given options as text ("text"), JSON ("json") or a picture ("svg"), without
 * loading it. A malloc'ed string for llaisysFreeString, or NULL. */
LLAISYS_API char *llaisysQwen2Plan(const char *path, const struct LlaisysQwen2Options *options, const char *format);
LLAISYS_API void llaisysFreeString(char *text);

LLAISYS_END

#endif
