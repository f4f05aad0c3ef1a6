/* Sums and copies along groupings (see grouping.py), the loss of a language model's head, and both ends of a product in 8 bits, for
   CPUs: each one pass over its matrices.

   The rows of a matrix are shared among threads, and a row is always worked on in the same order, so the bits of a result do
   not depend on the number of threads. bfloat16 adds up in float32 and is rounded once, to nearest even.

   This file includes itself once per instruction set; the best one that the processor has is chosen at run time. It is
   compiled with -fopenmp but not linked with an OpenMP library: its symbols resolve to the one that torch has loaded, since
   two thread pools in a process fight for the cores. */

#ifndef ROW

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 2048 }; /* floats that stay in the first cache beside the rest */

/* as grouping.Piece: the features of one piece are slots x repeats, side by side either by slot (neighbours) or by repeat */
typedef struct {
    int64_t feature, slot, slots, repeats, neighbours;
} piece;

typedef struct {
    const void *x; /* [rows, features] */
    void *y;       /* [rows, slots] */
    int64_t rows, features, slots, x_stride, y_stride;
    const piece *pieces;
    int64_t n_pieces;
} sum_job;

typedef struct {
    const void *weight; /* [outputs, inputs] */
    const void *square; /* [slots, slots] */
    void *result;       /* [outputs, inputs] */
    int64_t inputs, slots, weight_stride, square_stride;
    const piece *in_pieces, *out_pieces;
    int64_t n_in, n_out;
} add_job;

typedef struct {
    void *logits;          /* [rows, vocabulary]; overwritten by their gradients, when there is a gradient to make */
    const int64_t *labels; /* [rows]; negative: not scored */
    float *losses;         /* [rows] */
    int64_t vocabulary, stride;
    float scale; /* of the gradients */
    int gradient;
} loss_job;

typedef struct {
    const void *x;        /* [rows, features] */
    const float *columns; /* [features], factors of x; or NULL */
    int8_t *values;       /* [rows, padded] */
    float *scales;        /* [rows] */
    int64_t features, padded, x_stride;
} quantize_job;

typedef struct {
    const int32_t *sums;  /* [rows, features] */
    const float *rows;    /* [rows] */
    const float *columns; /* [features], or NULL */
    const void *slots_of; /* [rows, slots], or NULL: nothing is added */
    void *y;              /* [rows, features] */
    int64_t features, slots, sums_stride, slots_stride;
    const piece *pieces;
    int64_t n_pieces;
} scale_job;

typedef void quantize_rows(const quantize_job *, int64_t begin, int64_t end, float *scratch);
typedef void scale_rows(const scale_job *, int64_t begin, int64_t end, float *scratch);
typedef void loss_rows(const loss_job *, int64_t begin, int64_t end);
typedef void sum_rows(const sum_job *, int64_t begin, int64_t end, float *scratch);
typedef void add_rows(const add_job *, int64_t begin, int64_t end, float *scratch);

/* the next row: the processor does not see it coming where a row is read from several places at once */
static inline void fetch(const void *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)row + i);
}

static inline float widen_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* NaN needs no care: those that come from bfloat16 have low bits of zero, to which rounding does nothing */
static inline uint16_t narrow_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float widen_f32(float x) { return x; }
static inline float narrow_f32(float x) { return x; }

#define JOIN_(a, b, c) a##_##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define ROW(name) JOIN(name, TYPE, ISA)
#define WIDEN JOIN_2(widen, TYPE)
#define NARROW JOIN_2(narrow, TYPE)
#define JOIN_2_(a, b) a##_##b
#define JOIN_2(a, b) JOIN_2_(a, b)

#define ISA plain
#define LANES 4
#include "kernels.c"
#undef ISA
#undef LANES

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#define ISA avx2
#define LANES 8
#include "kernels.c"
#undef ISA
#undef LANES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define ISA avx512
#define LANES 16
#include "kernels.c"
#undef ISA
#undef LANES
#pragma GCC pop_options
#endif

enum { BF16, F32 };

static const struct isa {
    const char *name;
    sum_rows *sum[2];
    add_rows *add[2];
    loss_rows *loss[2];
    quantize_rows *quantize[2];
    scale_rows *scale[2];
}
#define BOTH(name, isa) {name##_bf16_##isa, name##_f32_##isa}
#define ALL(isa) {#isa, BOTH(sum, isa), BOTH(add, isa), BOTH(loss, isa), BOTH(quantize, isa), BOTH(scale, isa)}
plain = ALL(plain)
#if defined(__x86_64__) && defined(__GNUC__)
, avx2 = ALL(avx2), avx512 = ALL(avx512)
#endif
;

static int highest = 2; /* instruction sets, in order, that may be used */

static const struct isa *best(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (highest >= 2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &avx512;
    if (highest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return &avx2;
#endif
    return &plain;
}

/* the instruction set in use from now on: the best one up to the given place in their order */
const char *remora_use(int up_to) {
    highest = up_to;
    return best()->name;
}

/* checksum of this file, so that a library built from another version of it is found out */
uint32_t remora_source(void) { return SOURCE_CRC; }

/* y [rows, slots] = the sum of each slot's features of x [rows, features]; scratch: threads x width floats */
void remora_sum(int type, const sum_job *job, int threads, float *scratch, int64_t width) {
    sum_rows *const rows = best()->sum[type];
    if (threads == 1) {
        rows(job, 0, job->rows, scratch);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        rows(job, job->rows * t / threads, job->rows * (t + 1) / threads, scratch + t * width);
}

/* result [outputs, inputs] = weight + D square C; scratch: threads x width floats */
void remora_add(int type, const add_job *job, int threads, float *scratch, int64_t width) {
    add_rows *const rows = best()->add[type];
    if (threads == 1) {
        rows(job, 0, job->slots, scratch);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        rows(job, job->slots * t / threads, job->slots * (t + 1) / threads, scratch + t * width);
}

/* losses [rows] = log sum exp(logits) - logits[label], and then logits = scale (softmax(logits) - one at the label) */
void remora_loss(int type, const loss_job *job, int64_t n, int threads) {
    loss_rows *const rows = best()->loss[type];
    if (threads == 1) {
        rows(job, 0, n);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) rows(job, n * t / threads, n * (t + 1) / threads);
}

/* values [rows, padded] = x columns / scales, to the nearest whole number of -127 to 127, zero beyond the features; scratch: threads x width floats */
void remora_quantize(int type, const quantize_job *job, int64_t n, int threads, float *scratch, int64_t width) {
    quantize_rows *const rows = best()->quantize[type];
    if (threads == 1) {
        rows(job, 0, n, scratch);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) rows(job, n * t / threads, n * (t + 1) / threads, scratch + t * width);
}

/* y [rows, features] = sums rows columns + the copies of slots_of; scratch: threads x width floats */
void remora_scale(int type, const scale_job *job, int64_t n, int threads, float *scratch, int64_t width) {
    scale_rows *const rows = best()->scale[type];
    if (threads == 1) {
        rows(job, 0, n, scratch);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) rows(job, n * t / threads, n * (t + 1) / threads, scratch + t * width);
}

#elif !defined(TYPE)

#define TYPE bf16
#define element uint16_t
#include "kernels.c"
#undef TYPE
#undef element
#define TYPE f32
#define element float
#include "kernels.c"
#undef TYPE
#undef element

#else /* the rows of one matrix, for one TYPE and one ISA */

/* total[s] += the sum over k < n of x[s * step + k * jump]; a constant n lets the compiler vectorise */
#define ADD_UP(n, widen, x, step, jump) \
    for (int64_t s = 0; s < slots; s++) { \
        float sum = widen(x[s * (step)]); \
        for (int64_t k = 1; k < (n); k++) sum += widen(x[s * (step) + k * (jump)]); \
        total[s] += sum; \
    }

#define FIXED(n) case n: ADD_UP(n, WIDEN, x, 1, slots) return;
static void ROW(sum_distant)(const element *restrict x, float *restrict total, int64_t slots, int64_t repeats) {
    switch (repeats) { FIXED(1) FIXED(2) FIXED(3) FIXED(4) FIXED(5) FIXED(6) FIXED(7) FIXED(8) }
    ADD_UP(repeats, WIDEN, x, 1, slots)
}
#undef FIXED

#define FIXED(n) case n: ADD_UP(n, WIDEN, x, n, 1) return;
#define FIXED_WIDE(n) case n: ADD_UP(n, widen_f32, floats, n, 1) return;
static void ROW(sum_neighbours)(const element *restrict x, float *restrict total, int64_t slots, int64_t repeats, float *restrict wide) {
    switch (repeats) { FIXED(1) FIXED(2) FIXED(3) FIXED(4) } /* the compiler knows how to take these apart in registers */
    if (repeats > BLOCK) {
        ADD_UP(repeats, WIDEN, x, repeats, 1)
        return;
    }
    const float *floats = sizeof *x == sizeof *wide ? (const void *)x : wide;
    if (floats == wide)
        for (int64_t f = 0; f < slots * repeats; f++) wide[f] = WIDEN(x[f]);
    switch (repeats) { FIXED_WIDE(5) FIXED_WIDE(6) FIXED_WIDE(7) FIXED_WIDE(8) }
    ADD_UP(repeats, widen_f32, floats, repeats, 1)
}
#undef FIXED
#undef FIXED_WIDE
#undef ADD_UP

static void ROW(sum)(const sum_job *job, int64_t begin, int64_t end, float *restrict total) {
    float wide[BLOCK];
    for (int64_t r = begin; r < end; r++) {
        const element *restrict x = (const element *)job->x + r * job->x_stride;
        element *restrict y = (element *)job->y + r * job->y_stride;
        if (r + 1 < end && !job->pieces[0].neighbours) fetch(x + job->x_stride, job->features * sizeof *x);
        memset(total, 0, job->slots * sizeof(float));
        for (int64_t i = 0; i < job->n_pieces; i++) {
            const piece p = job->pieces[i];
            if (!p.neighbours) {
                ROW(sum_distant)(x + p.feature, total + p.slot, p.slots, p.repeats);
                continue;
            }
            const int64_t block = p.repeats < BLOCK ? BLOCK / p.repeats : 1;
            for (int64_t s = 0; s < p.slots; s += block)
                ROW(sum_neighbours)(x + p.feature + s * p.repeats, total + p.slot + s, s + block < p.slots ? block : p.slots - s, p.repeats, wide);
        }
        for (int64_t s = 0; s < job->slots; s++) y[s] = NARROW(total[s]);
    }
}

typedef float ROW(vector) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ROW(indices) __attribute__((vector_size(4 * LANES)));
typedef uint32_t ROW(words) __attribute__((vector_size(4 * LANES)));
typedef element ROW(elements) __attribute__((vector_size(sizeof(element) * LANES), aligned(sizeof(element))));

static void ROW(copy_neighbours)(const float *restrict row, float *restrict wide, int64_t slots, int64_t repeats) {
    const int64_t whole = slots / LANES * LANES;
    for (int64_t k = 0; k < repeats; k++) {
        ROW(indices) from; /* LANES slots fill as many vectors as there are repeats */
        for (int l = 0; l < LANES; l++) from[l] = (k * LANES + l) / repeats;
        for (int64_t s = 0; s < whole; s += LANES) {
            ROW(vector) *to = (ROW(vector) *)(wide + s * repeats + k * LANES);
            *to += __builtin_shuffle(*(const ROW(vector) *)(row + s), from);
        }
    }
    for (int64_t s = whole; s < slots; s++)
        for (int64_t k = 0; k < repeats; k++) wide[s * repeats + k] += row[s];
}

static void ROW(copy_distant)(const float *restrict row, float *restrict wide, int64_t slots, int64_t repeats) {
    for (int64_t k = 0; k < repeats; k++)
        for (int64_t s = 0; s < slots; s++) wide[k * slots + s] += row[s];
}

/* wide [features] = the copies of the slots */
static void ROW(copy)(const piece *pieces, int64_t n, const element *restrict slots_of, int64_t slots, int64_t features, float *restrict row, float *restrict wide) {
    for (int64_t s = 0; s < slots; s++) row[s] = WIDEN(slots_of[s]);
    memset(wide, 0, features * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        const piece p = pieces[i];
        (p.neighbours ? ROW(copy_neighbours) : ROW(copy_distant))(row + p.slot, wide + p.feature, p.slots, p.repeats);
    }
}

/* begin and end count rows of the square; each serves all outputs of its slot */
static void ROW(add)(const add_job *job, int64_t begin, int64_t end, float *restrict scratch) {
    float *restrict row = scratch, *restrict wide = scratch + job->slots;
    for (int64_t r = begin; r < end; r++) {
        ROW(copy)(job->in_pieces, job->n_in, (const element *)job->square + r * job->square_stride, job->slots, job->inputs, row, wide);
        for (int64_t i = 0; i < job->n_out; i++) {
            const piece p = job->out_pieces[i];
            if (r < p.slot || r >= p.slot + p.slots) continue;
            for (int64_t k = 0; k < p.repeats; k++) {
                const int64_t o = p.feature + (p.neighbours ? (r - p.slot) * p.repeats + k : k * p.slots + r - p.slot);
                const element *restrict weight = (const element *)job->weight + o * job->weight_stride;
                element *restrict result = (element *)job->result + o * job->inputs;
                for (int64_t f = 0; f < job->inputs; f++) result[f] = NARROW(WIDEN(weight[f]) + wide[f]);
            }
        }
    }
}

/* as widen and narrow, LANES at once */
static inline ROW(vector) ROW(load)(const element *x) {
    const ROW(elements) some = *(const ROW(elements) *)x;
    if (sizeof *x == 2) return (ROW(vector))(__builtin_convertvector(some, ROW(words)) << 16);
    return __builtin_convertvector(some, ROW(vector));
}

static inline void ROW(store)(element *x, ROW(vector) f) {
    const ROW(words) bits = (ROW(words))f;
    if (sizeof *x == 2)
        *(ROW(elements) *)x = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, ROW(elements));
    else
        *(ROW(elements) *)x = __builtin_convertvector(f, ROW(elements));
}

/* exp of x <= 0 to 2 units in the last place, with the polynomial of expf in Cephes (netlib); less than 2^-126 becomes 0, NaN stays */
static inline ROW(vector) ROW(exponential)(ROW(vector) x) {
    const ROW(vector) zero = {0}, lowest = zero - 87.33654f, magic = zero + 12582912.0f; /* 1.5 * 2^23 rounds to whole numbers */
    const ROW(indices) small = x < lowest;
    x = (ROW(vector))(((ROW(indices))lowest & small) | ((ROW(indices))x & ~small));
    const ROW(vector) shifted = x * 1.44269504088896341f + magic, whole = shifted - magic;
    const ROW(vector) r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    ROW(vector) p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ROW(words) power = ((ROW(words))shifted + 127u) << 23; /* the low bits of shifted hold the whole number */
    return (ROW(vector))((ROW(indices))(p * (ROW(vector))power) & ~small);
}

/* the last, incomplete vector of a row, filled up with a value */
static inline ROW(vector) ROW(load_last)(const element *x, int64_t n, float fill) {
    float wide[LANES];
    for (int64_t l = 0; l < LANES; l++) wide[l] = l < n ? WIDEN(x[l]) : fill;
    return *(ROW(vector) *)wide;
}

static void ROW(loss)(const loss_job *job, int64_t begin, int64_t end) {
    const int64_t n = job->vocabulary, whole = n / LANES * LANES;
    const ROW(vector) zero = {0};
    for (int64_t r = begin; r < end; r++) {
        element *restrict x = (element *)job->logits + r * job->stride;
        const int64_t label = job->labels[r];
        if (label < 0) {
            job->losses[r] = 0;
            if (job->gradient) memset(x, 0, n * sizeof *x);
            continue;
        }
        ROW(vector) most = zero - INFINITY, sums = zero;
        for (int64_t i = 0; i < n; i += LANES) {
            const ROW(vector) some = i < whole ? ROW(load)(x + i) : ROW(load_last)(x + i, n - i, -INFINITY);
            const ROW(indices) more = some > most;
            most = (ROW(vector))(((ROW(indices))some & more) | ((ROW(indices))most & ~more));
        }
        float highest = -INFINITY, sum = 0;
        for (int l = 0; l < LANES; l++) highest = most[l] > highest ? most[l] : highest;
        for (int64_t i = 0; i < whole; i += LANES) sums += ROW(exponential)(ROW(load)(x + i) - highest);
        for (int l = 0; l < LANES; l++) sum += sums[l];
        if (whole < n) {
            const ROW(vector) last = ROW(exponential)(ROW(load_last)(x + whole, n - whole, -INFINITY) - highest);
            for (int64_t i = whole; i < n; i++) sum += last[i - whole];
        }
        const float scale = job->scale / sum, given = WIDEN(x[label]);
        job->losses[r] = logf(sum) + highest - given;
        if (!job->gradient) continue;
        for (int64_t i = 0; i < whole; i += LANES) ROW(store)(x + i, ROW(exponential)(ROW(load)(x + i) - highest) * scale);
        if (whole < n) {
            const ROW(vector) last = ROW(exponential)(ROW(load_last)(x + whole, n - whole, -INFINITY) - highest) * scale;
            for (int64_t i = whole; i < n; i++) x[i] = NARROW(last[i - whole]);
        }
        float chosen[LANES] = {given - highest};
        x[label] = NARROW((ROW(exponential)(*(ROW(vector) *)chosen)[0] / sum - 1.0f) * job->scale);
    }
}

/* a scale is never below the smallest normal number, so its reciprocal is finite; NaN and infinity stay in it */
static void ROW(quantize)(const quantize_job *job, int64_t begin, int64_t end, float *restrict wide) {
    const int64_t n = job->features;
    for (int64_t r = begin; r < end; r++) {
        const element *restrict x = (const element *)job->x + r * job->x_stride;
        int8_t *restrict values = job->values + r * job->padded;
        if (job->columns)
            for (int64_t f = 0; f < n; f++) wide[f] = WIDEN(x[f]) * job->columns[f];
        else
            for (int64_t f = 0; f < n; f++) wide[f] = WIDEN(x[f]);
        int32_t most = 0; /* the bits of positive numbers have the order of the numbers, and NaN is above infinity */
        for (int64_t f = 0; f < n; f++) {
            int32_t bits;
            memcpy(&bits, wide + f, sizeof bits);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float scale;
        memcpy(&scale, &most, sizeof scale);
        scale /= 127.0f;
        if (scale < FLT_MIN) scale = FLT_MIN;
        const float inverse = 1.0f / scale;
        for (int64_t f = 0; f < n; f++) values[f] = (int8_t)(int32_t)rintf(wide[f] * inverse);
        memset(values + n, 0, job->padded - n);
        job->scales[r] = scale;
    }
}

static void ROW(scale)(const scale_job *job, int64_t begin, int64_t end, float *restrict scratch) {
    const int64_t n = job->features;
    const float *restrict columns = job->columns;
    float *restrict row = scratch, *restrict wide = scratch + job->slots;
    for (int64_t r = begin; r < end; r++) {
        const int32_t *restrict sums = job->sums + r * job->sums_stride;
        element *restrict y = (element *)job->y + r * n;
        const float factor = job->rows[r];
        if (job->slots_of) {
            ROW(copy)(job->pieces, job->n_pieces, (const element *)job->slots_of + r * job->slots_stride, job->slots, n, row, wide);
            if (columns)
                for (int64_t f = 0; f < n; f++) y[f] = NARROW((float)sums[f] * factor * columns[f] + wide[f]);
            else
                for (int64_t f = 0; f < n; f++) y[f] = NARROW((float)sums[f] * factor + wide[f]);
        } else if (columns)
            for (int64_t f = 0; f < n; f++) y[f] = NARROW((float)sums[f] * factor * columns[f]);
        else
            for (int64_t f = 0; f < n; f++) y[f] = NARROW((float)sums[f] * factor);
    }
}

#endif
