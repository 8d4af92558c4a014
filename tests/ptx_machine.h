/* What tests/ptx_machine.py puts around a kernel that it has translated from PTX: a block of threads on the CPU.

   Every thread is a context of its own. One runs at a time, until a barrier, an instruction of the whole warp, or its
   end. Every access to memory is looked at: alignment, bounds, and whether another thread has touched the same four
   bytes where no barrier lies between, which on a GPU may happen in either order. Whatever is found ends the launch. */

#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { MOST_THREADS = 1024, MOST_ARRAYS = 4096, WARP = 32, STACK = 128 * 1024 };

static struct { uint32_t x, y, z; } block, blocks;
static uint32_t threads, dynamic_shared, current;
static void **parameters;
static void kernel(void); /* the translated one */

/* --- bits ------------------------------------------------------------------------------------------------------- */

#define BITS(name, from, to)                                                                                            \
    static to name(from x) { to y; memcpy(&y, &x, sizeof y); return y; }
BITS(f32_of_bits, uint32_t, float)
BITS(bits_of_f32, float, uint32_t)
BITS(f64_of_bits, uint64_t, double)
BITS(bits_of_f64, double, uint64_t)

static float saturated(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

static float fma_down(float a, float b, float c) {
    fesetround(FE_DOWNWARD);
    volatile float x = a, y = b, z = c, result = fmaf(x, y, z);
    fesetround(FE_TONEAREST);
    return result;
}

/* To 10 bits of mantissa, ties away from zero. */
static uint32_t tf32(float x) { return isfinite(x) ? (bits_of_f32(x) + 0x1000) & ~0x1fffu : bits_of_f32(x); }

static uint64_t insert_bits(uint64_t a, uint64_t b, uint32_t at, uint32_t count) {
    uint64_t mask = (count < 64 ? (1ull << count) - 1 : ~0ull) << at;
    return (b & ~mask) | ((a << at) & mask);
}

/* --- threads ---------------------------------------------------------------------------------------------------- */

static enum { RUNNING, WAITING, ENDED } state[MOST_THREADS];
static ucontext_t scheduler, contexts[MOST_THREADS];
static char *stacks, report[256];
static uint64_t progress;
static uint32_t era; /* counts barriers */

const char *reported(void) { return report; }

static void pause_thread(void) {
    uint32_t me = current;
    swapcontext(&contexts[me], &scheduler);
}

static void give_up(const char *what, uint64_t where) {
    if (!*report)
        snprintf(report, sizeof report, "%s (%llx) in thread %u of block (%u, %u, %u)", what, (unsigned long long)where,
                 current, block.x, block.y, block.z);
    state[current] = ENDED;
    setcontext(&scheduler);
}

static void barrier(void) {
    state[current] = WAITING;
    pause_thread();
}

static void thread(void) {
    kernel();
    state[current] = ENDED;
    progress++;
    setcontext(&scheduler);
}

static uint32_t count_in(int wanted) {
    uint32_t count = 0;
    for (uint32_t t = 0; t < threads; t++) count += state[t] == wanted;
    return count;
}

static void run_block(void) {
    for (uint32_t t = 0; t < threads; t++) {
        state[t] = RUNNING;
        getcontext(&contexts[t]);
        contexts[t].uc_stack.ss_sp = stacks + (size_t)t * STACK;
        contexts[t].uc_stack.ss_size = STACK;
        makecontext(&contexts[t], thread, 0);
    }
    while (!*report && count_in(ENDED) < threads) {
        uint64_t before = progress;
        for (current = 0; current < threads && !*report; current++)
            if (state[current] == RUNNING) swapcontext(&scheduler, &contexts[current]);
        if (*report || count_in(RUNNING) || !count_in(WAITING)) {
            if (!*report && count_in(RUNNING) && progress == before)
                snprintf(report, sizeof report, "some threads of a warp wait for the others for ever");
            continue;
        }
        if (count_in(ENDED)) snprintf(report, sizeof report, "some threads ended, others wait at a barrier");
        for (uint32_t t = 0; t < threads; t++) state[t] = RUNNING;
        era++, progress++;
    }
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

typedef struct { uint32_t writer, reader, written, read; } Trace; /* threads, from 1 on; eras */
enum { SEVERAL = 0xffffffffu };
static uint64_t *arrays; /* begin and end of each */
static int array_count, latest;
static Trace *array_traces[MOST_ARRAYS], *shared_traces;
static char *shared;
static uint32_t shared_size;

static void trace(Trace *at, uint32_t me, uint32_t now, int store, uint64_t where) {
    if (at->writer && at->writer != me && at->written == now) give_up("what another thread writes is touched", where);
    if (store && at->reader && at->reader != me && at->read == now) give_up("what another thread reads is written", where);
    if (store)
        at->writer = me, at->written = now;
    else {
        at->reader = at->reader && at->reader != me && at->read == now ? SEVERAL : me;
        at->read = now;
    }
}

static char *global_at(uint64_t at, int size, int store) {
    if (at % size) give_up("global memory: not aligned", at);
    for (int tried = 0; at < arrays[2 * latest] || at + size > arrays[2 * latest + 1]; latest = (latest + 1) % array_count)
        if (tried++ == array_count) give_up(store ? "a store outside of all arrays" : "a load outside of all arrays", at);
    uint32_t me = ((block.z * blocks.y + block.y) * blocks.x + block.x) * threads + current + 1;
    for (int byte = 0; size >= 4 && byte < size; byte += 4) /* no barrier counts here: other blocks know none */
        trace(array_traces[latest] + (at + byte - arrays[2 * latest]) / 4, me, 0, store, at);
    return (char *)at;
}

static char *shared_at(uint64_t at, int size, int store) {
    if (at % size) give_up("shared memory: not aligned", at);
    if (at + size > shared_size) give_up("outside of shared memory", at);
    for (int byte = 0; byte < size; byte += 4) {
        Trace *word = shared_traces + (at + byte) / 4;
        if (!store && !word->writer) give_up("shared memory that nobody wrote is read", at);
        trace(word, current + 1, era, store, at);
    }
    return shared + at;
}

/* --- the tensor cores -------------------------------------------------------------------------------------------- */

typedef struct { float a[4], b[2], c[4]; } Share;
static struct { Share shares[WARP]; int arrived; uint64_t done; } warps[MOST_THREADS / WARP];

/* c += a b for 16 x 8 times 8 x 8 numbers: PTX ISA, "Matrix Fragments for mma.m16n8k8", for .tf32. */
static void mma(float a[4], float b[2], float c[4]) {
    int w = current / WARP, lane = current % WARP;
    uint64_t before = warps[w].done;
    for (int i = 0; i < 4; i++)
        if (bits_of_f32(a[i]) & 0x1fff || bits_of_f32(b[i / 2]) & 0x1fff) give_up("mma: a factor is not TF32", 0);
    Share *mine = &warps[w].shares[lane];
    memcpy(mine->a, a, sizeof mine->a), memcpy(mine->b, b, sizeof mine->b), memcpy(mine->c, c, sizeof mine->c);
    if (++warps[w].arrived < WARP)
        while (warps[w].done == before) pause_thread();
    else {
        float A[16][8], B[8][8];
        for (int l = 0; l < WARP; l++) {
            Share *s = &warps[w].shares[l];
            int groupID = l >> 2, threadID_in_group = l % 4;
            for (int i = 0; i < 4; i++)
                A[i == 0 || i == 2 ? groupID : groupID + 8][i < 2 ? threadID_in_group : threadID_in_group + 4] = s->a[i];
            for (int i = 0; i < 2; i++) B[i == 0 ? threadID_in_group : threadID_in_group + 4][groupID] = s->b[i];
        }
        for (int l = 0; l < WARP; l++) {
            Share *s = &warps[w].shares[l];
            for (int i = 0; i < 4; i++) {
                int row = i < 2 ? l >> 2 : (l >> 2) + 8, column = (l % 4) * 2 + (i & 1);
                double sum = s->c[i];
                for (int k = 0; k < 8; k++) sum += (double)A[row][k] * B[k][column];
                s->c[i] = sum;
            }
        }
        warps[w].arrived = 0, warps[w].done++, progress++;
    }
    memcpy(c, mine->c, sizeof mine->c);
}

/* --- a launch ---------------------------------------------------------------------------------------------------- */

int launch(void **values, uint32_t x, uint32_t y, uint32_t z, uint32_t count, uint32_t dynamic, int known, uint64_t *begins_ends) {
    parameters = values, blocks.x = x, blocks.y = y, blocks.z = z, threads = count, dynamic_shared = dynamic;
    arrays = begins_ends, array_count = known, latest = 0, *report = 0;
    shared_size = STATIC_SHARED + dynamic;
    shared = aligned_alloc(256, (shared_size / 256 + 1) * 256);
    shared_traces = malloc((shared_size / 4 + 1) * sizeof(Trace));
    if (!stacks) stacks = malloc((size_t)MOST_THREADS * STACK);
    for (int i = 0; i < known; i++) array_traces[i] = calloc((arrays[2 * i + 1] - arrays[2 * i]) / 4 + 1, sizeof(Trace));
    for (block.z = 0; block.z < z && !*report; block.z++)
        for (block.y = 0; block.y < y && !*report; block.y++)
            for (block.x = 0; block.x < x && !*report; block.x++) {
                memset(shared_traces, 0, (shared_size / 4 + 1) * sizeof(Trace));
                memset(shared, 0xff, shared_size);
                memset(warps, 0, sizeof warps);
                run_block();
            }
    for (int i = 0; i < known; i++) free(array_traces[i]);
    free(shared), free(shared_traces);
    return *report != 0;
}
