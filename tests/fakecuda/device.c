/* A CUDA device that says yes to everything and does nothing, for a machine without one.
 *
 * One library stands in for the runtime (preloaded, its names come before those of libcudart) and for the driver (its
 * soname is libcuda.so.1, which whoever opens that file then gets). Only what torch asks while it makes fake tensors
 * and writes code is here. A result that a caller looks at is given; the other functions just succeed, whatever their
 * arguments are. Memory is the host's, for the few small tensors that Inductor makes for itself; kernels do not run. */
#include <driver_types.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 13000
#define MAJOR 9
#define MULTIPROCESSORS 132
#define SHARED_MEMORY 232448 /* bytes of a block that asks for it */

#define SUCCEEDS(name) int name(void) { return 0; }
#define GIVES(name, type, given) int name(type *result) { *result = given; return 0; }

static char handle[64]; /* a stream, an event, a module: nothing looks inside */

/* c10::cuda::hasPrimaryContext: without a context nobody waits for a stream */
bool _ZN3c104cuda17hasPrimaryContextEa(signed char device) { return false; }

GIVES(cudaGetDeviceCount, int, 1)
GIVES(cudaGetDevice, int, 0)
GIVES(cudaDriverGetVersion, int, VERSION)
GIVES(cudaRuntimeGetVersion, int, VERSION)
GIVES(cudaStreamCreateWithPriority, void *, handle)
GIVES(cudaEventCreateWithFlags, void *, handle)
SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaDeviceSynchronize)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamSynchronize)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventSynchronize)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)
SUCCEEDS(cudaLaunchKernel)
SUCCEEDS(cudaLaunchKernelExC)
SUCCEEDS(cudaMemsetAsync)

int cudaMalloc(void **memory, size_t size) { *memory = aligned_alloc(512, (size + 511) / 512 * 512); return !*memory; }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaMemGetInfo(size_t *left, size_t *total) { *left = *total = 80UL << 30; return 0; }

int cudaMemcpyAsync(void *to, const void *from, size_t size, int direction, void *stream) {
    memcpy(to, from, size);
    return 0;
}

int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? MAJOR
             : attribute == cudaDevAttrMultiProcessorCount  ? MULTIPROCESSORS
                                                             : 0;
    return 0;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "NVIDIA H100 80GB HBM3");
    properties->major = MAJOR;
    properties->multiProcessorCount = MULTIPROCESSORS;
    properties->totalGlobalMem = 80UL << 30;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxThreadsPerBlock = 1024;
    properties->warpSize = 32;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = SHARED_MEMORY;
    properties->sharedMemPerMultiprocessor = 228 << 10;
    properties->regsPerMultiprocessor = 65536;
    properties->l2CacheSize = 50 << 20;
    return 0;
}

GIVES(cuDriverGetVersion, int, VERSION)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDeviceGet, int, 0)
GIVES(cuCtxGetCurrent, void *, 0)
GIVES(cuDevicePrimaryCtxRetain, void *, 0)
GIVES(cuModuleLoadData, void *, handle)
GIVES(cuModuleGetFunction, void *, handle)
GIVES(cuCtxGetLimit, size_t, 0)
GIVES(cuCtxGetDevice, int, 0)
GIVES(cuOccupancyMaxActiveClusters, int, 1)
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuLaunchKernel)
SUCCEEDS(cuLaunchKernelEx)
SUCCEEDS(cuModuleUnload)

int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    const int max_threads_per_block = 0; /* of cuda.h's CUfunction_attribute */
    *value = attribute == max_threads_per_block ? 1024 : 0;
    return 0;
}

int cuGetErrorString(int error, const char **text) { *text = "a stand-in for CUDA"; return 0; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 0;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor         ? MAJOR
             : attribute == cudaDevAttrComputeCapabilityMinor       ? 0
             : attribute == cudaDevAttrMultiProcessorCount          ? MULTIPROCESSORS
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? SHARED_MEMORY
             : attribute == cudaDevAttrMaxRegistersPerMultiprocessor ? 65536
             : attribute == cudaDevAttrWarpSize                     ? 32
                                                                    : 1;
    return 0;
}
