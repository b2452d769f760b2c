// A simulated GPU: implements the functions of CUDA 13, cuBLAS and cuDNN that torch calls, without a device.
//
// Device memory is host memory, and only pages that are written to are allocated. Copies are executed, but kernels
// compute nothing, so results are whatever the memory contains. The rules of stream capture are checked (CUDA C++
// Programming Guide, "CUDA Graphs"; error codes of driver_types.h): a call that breaks a rule returns the same error as
// CUDA, and the capture becomes invalid. Broken rules, and errors that a GPU would not report, are counted and written
// to stderr after "simulated GPU:".
//
// card.py generates stubs that return 0 for all functions that are not defined here.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

extern "C" {
// Read by card.py, in this order.
long simulated_counts[6];
}
enum { KERNELS, CAPTURED_KERNELS, CAPTURES, REPLAYS, WAITS, BROKEN_RULES };

namespace {

struct Stream { long capture = 0; bool is_joined = true; };
struct Event { long capture = 0; bool recorded = false; Stream* by = nullptr; };
struct Graph { Stream* origin; bool is_invalid = false; };

std::recursive_mutex lock;
std::set<Stream*> streams;
std::map<long, Graph*> captures;  // in progress
std::map<char*, size_t> on_gpu, pinned;
std::map<void*, cudaStream_t> stream_of;  // handles of cuBLAS and cuDNN
std::map<const void*, std::string> names;  // kernel names
std::map<std::string, long> launches;  // per kernel, copy and memset, since the last simulated_write_launches
size_t used = 0;
long num_captures = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local auto mode = cudaStreamCaptureModeGlobal;

size_t total() {
    const char* gib = getenv("SIMULATED_GIB");
    return size_t((gib ? atof(gib) : 80.0) * (1ull << 30));
}

void report(const std::string& what) {
    simulated_counts[BROKEN_RULES]++;
    fprintf(stderr, "simulated GPU: %s\n", what.c_str());
}

cudaError_t violation(cudaError_t error, const std::string& what) {
    report(what);
    for (auto& one : captures) one.second->is_invalid = true;
    return last = error;
}

bool is_legacy(cudaStream_t stream) { return size_t(stream) < 10; }
long capture_of(cudaStream_t stream) { return is_legacy(stream) ? 0 : ((Stream*)stream)->capture; }

// For calls that CUDA forbids while any stream is capturing in global mode, except from a thread in relaxed mode.
cudaError_t check_not_capturing(const char* call) {
    if (captures.empty() || mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    return violation(cudaErrorStreamCaptureUnsupported, std::string(call) + " while a stream is capturing");
}

cudaError_t count_wait(cudaStream_t stream, long event_capture, const char* call) {
    if (capture_of(stream) || captures.count(event_capture))
        return violation(cudaErrorStreamCaptureUnsupported, std::string(call) + " on a capturing stream or event");
    if (auto error = check_not_capturing(call)) return error;
    simulated_counts[WAITS]++;
    return cudaSuccess;
}

void check_queued(cudaStream_t stream, const char* what) {
    if (capture_of(stream)) {
        ((Stream*)stream)->is_joined = false;
        return;
    }
    if (!captures.empty()) report(std::string(what) + " outside of a capture in progress, which does not include it");
}

void count_launch(cudaStream_t stream, const std::string& name) {
    std::lock_guard guard(lock);
    check_queued(stream, "a kernel");
    launches[name]++;
    simulated_counts[capture_of(stream) ? CAPTURED_KERNELS : KERNELS]++;
}

bool contains(const std::map<char*, size_t>& blocks, const void* address) {
    auto after = blocks.upper_bound((char*)address);
    if (after == blocks.begin()) return false;
    auto& [start, size] = *--after;
    return (char*)address < start + size;
}

char* map_memory(size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    return (char*)mmap(nullptr, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
}

cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
    std::lock_guard guard(lock);
    check_queued(stream, "a copy");
    launches["memcpy"]++;
    auto is_known = [](const void* address) { return contains(on_gpu, address) || contains(pinned, address); };
    if (!capture_of(stream)) memcpy(to, from, size);
    else if (!is_known(from) || !is_known(to))
        report("a captured copy uses pageable memory, and each replay repeats it at the same address");
    return cudaSuccess;
}

}  // namespace

extern "C" {

// The device
cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "simulated GPU");
    found->totalGlobalMem = total();
    found->major = 9;
    found->multiProcessorCount = 132;
    found->warpSize = 32;
    found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->sharedMemPerBlock = 49152;
    found->sharedMemPerBlockOptin = 232448;
    found->sharedMemPerMultiprocessor = 233472;
    found->textureAlignment = 512;
    found->l2CacheSize = 50 << 20;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    static const std::map<int, int> known = {
        {cudaDevAttrMaxThreadsPerBlock, 1024}, {cudaDevAttrMaxBlockDimX, 1024}, {cudaDevAttrMaxBlockDimY, 1024},
        {cudaDevAttrMaxBlockDimZ, 64}, {cudaDevAttrMaxGridDimX, 2147483647}, {cudaDevAttrMaxGridDimY, 65535},
        {cudaDevAttrMaxGridDimZ, 65535}, {cudaDevAttrMaxSharedMemoryPerBlock, 49152}, {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMultiProcessorCount, 132}, {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
        {cudaDevAttrComputeCapabilityMajor, 9}, {cudaDevAttrComputeCapabilityMinor, 0},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472}, {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
    };
    auto found = known.find(attribute);
    *value = found == known.end() ? 1 : found->second;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { auto error = last; last = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorSimulated"; }
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
        default: return "simulated error";
    }
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** found, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
    *found = dlsym(RTLD_DEFAULT, name);
    if (!*found) *found = dlsym(RTLD_DEFAULT, "cuInit");
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// Memory
cudaError_t cudaMalloc(void** found, size_t size) {
    std::lock_guard guard(lock);
    if (auto error = check_not_capturing("cudaMalloc")) return error;
    if (used + size > total()) return last = cudaErrorMemoryAllocation;
    char* block = map_memory(size);
    on_gpu[block] = size;
    used += size;
    *found = block;
    return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
    std::lock_guard guard(lock);
    if (auto error = check_not_capturing("cudaFree")) return error;
    auto found = on_gpu.find((char*)address);
    if (found == on_gpu.end()) return cudaSuccess;
    used -= found->second;
    munmap(address, found->second);
    on_gpu.erase(found);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** found, size_t size, unsigned) {
    std::lock_guard guard(lock);
    if (auto error = check_not_capturing("cudaHostAlloc")) return error;
    char* block = map_memory(size);
    pinned[block] = size;
    *found = block;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* address) {
    std::lock_guard guard(lock);
    pinned.erase((char*)address);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* unused, size_t* all) {
    std::lock_guard guard(lock);
    *all = total();
    *unused = *all - used;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
    std::lock_guard guard(lock);
    memset(found, 0, sizeof *found);
    found->type = contains(on_gpu, address) ? cudaMemoryTypeDevice
        : contains(pinned, address) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    found->devicePointer = found->hostPointer = const_cast<void*>(address);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    return copy(to, from, size, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    std::lock_guard guard(lock);
    if (auto error = count_wait(nullptr, 0, "cudaMemcpy")) return error;
    memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t pitch, size_t width, size_t rows, cudaMemcpyKind,
    cudaStream_t stream) {
    for (size_t row = 0; row < rows; row++)
        copy((char*)to + row * to_pitch, (char*)from + row * pitch, width, stream);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t stream) {
    std::lock_guard guard(lock);
    check_queued(stream, "a memset");
    launches["memset"]++;
    if (!capture_of(stream) && value) memset(address, value, size);  // writing zeros would allocate pages
    return cudaSuccess;
}
cudaError_t cudaMemset(void* address, int value, size_t size) { return cudaMemsetAsync(address, value, size, nullptr); }
cudaError_t cudaGetSymbolAddress(void** found, const void*) { *found = calloc(1, 1 << 16); return cudaSuccess; }

// Streams and events
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned, int) {
    std::lock_guard guard(lock);
    auto* stream = new Stream;
    streams.insert(stream);
    *made = (cudaStream_t)stream;
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* made) { return cudaStreamCreateWithPriority(made, 0, 0); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    std::lock_guard guard(lock);
    return count_wait(stream, 0, "cudaStreamSynchronize");
}
cudaError_t cudaDeviceSynchronize() {
    std::lock_guard guard(lock);
    return count_wait(nullptr, 0, "cudaDeviceSynchronize");
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    std::lock_guard guard(lock);
    if (capture_of(stream))
        return violation(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery of a capturing stream");
    return check_not_capturing("cudaStreamQuery");
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t given, unsigned) {
    std::lock_guard guard(lock);
    auto* event = (Event*)given;
    long own = capture_of(stream), other = captures.count(event->capture) ? event->capture : 0;
    if (other && is_legacy(stream))
        return violation(cudaErrorStreamCaptureImplicit, "the default stream waits for a captured event");
    if (other && own && own != other) return violation(cudaErrorStreamCaptureMerge, "a wait would merge two captures");
    if (other && event->by) event->by->is_joined = true;
    if (other && !own) *(Stream*)stream = {other, false};
    else if (own && !other && event->recorded)
        return violation(cudaErrorStreamCaptureIsolation, "a capturing stream waits for an event from outside");
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* made) { *made = (cudaEvent_t) new Event; return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) { return cudaEventCreate(made); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    std::lock_guard guard(lock);
    *(Event*)event = {capture_of(stream), true, is_legacy(stream) ? nullptr : (Stream*)stream};
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    std::lock_guard guard(lock);
    if (captures.count(((Event*)event)->capture))
        return violation(cudaErrorCapturedEvent, "cudaEventQuery of a captured event");
    return check_not_capturing("cudaEventQuery");
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    std::lock_guard guard(lock);
    return count_wait(nullptr, ((Event*)event)->capture, "cudaEventSynchronize");
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 1;
    return cudaSuccess;
}

// Graphs
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* given) {
    std::swap(*given, mode);
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    std::lock_guard guard(lock);
    if (is_legacy(stream))
        return violation(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture on the default stream");
    long number = ((Stream*)stream)->capture = ++num_captures;
    captures[number] = new Graph{(Stream*)stream};
    simulated_counts[CAPTURES]++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* found) {
    std::lock_guard guard(lock);
    long number = capture_of(stream);
    if (!number || captures[number]->origin != (Stream*)stream) return last = cudaErrorIllegalState;
    auto* graph = captures[number];
    captures.erase(number);
    for (auto* one : streams) {
        if (one->capture != number) continue;
        if (one != graph->origin && !one->is_joined) {
            report("a stream that joined a capture is not joined back at its end");
            graph->is_invalid = true;
        }
        one->capture = 0;
    }
    *found = graph->is_invalid ? nullptr : (cudaGraph_t)graph;
    return graph->is_invalid ? last = cudaErrorStreamCaptureInvalidated : cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* found) {
    std::lock_guard guard(lock);
    if (is_legacy(stream) && !captures.empty() && mode != cudaStreamCaptureModeRelaxed)
        return violation(cudaErrorStreamCaptureImplicit, "cudaStreamIsCapturing on the default stream in a capture");
    *found = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* found, unsigned long long* number, cudaGraph_t* graph,
    const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* count) {
    std::lock_guard guard(lock);
    long own = capture_of(stream);
    *found = own ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (number) *number = own;
    if (graph) *graph = own ? (cudaGraph_t)captures[own] : nullptr;
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    *made = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
    std::lock_guard guard(lock);
    if (!captures.empty()) report("a graph is launched during a capture");
    simulated_counts[REPLAYS]++;
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    if (!capture_of(stream)) function(data);
    return cudaSuccess;
}

// Kernels
void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
    names[function] = name;
}
void simulated_write_launches(const char* path) {
    std::lock_guard guard(lock);
    FILE* file = fopen(path, "w");
    for (auto& [name, count] : launches) fprintf(file, "%ld %s\n", count, name.c_str());
    fclose(file);
    launches.clear();
}
struct Launch { dim3 grid, block; size_t shared; void* stream; };
static thread_local Launch launch;
void** __cudaRegisterFatBinary(void*) { static void* none[4]; return none; }
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    launch = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = launch.grid;
    *block = launch.block;
    *shared = launch.shared;
    *(void**)stream = launch.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* found, const void* function) {
    *found = (cudaKernel_t)function;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
    count_launch(stream, names[kernel]);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* function, void**) {
    count_launch(how->stream, names[function]);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
    *count = 2;
    return cudaSuccess;
}

// The driver functions that torch calls
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) { *flags = 0; *is_active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)1; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuGetErrorString(int, const char** found) { *found = "simulated error"; return 0; }

// The driver functions that Triton calls
struct DriverLaunch { unsigned grid[3], block[3], shared; cudaStream_t stream; };  // CUlaunchConfig
int cuDeviceGetAttribute(int* value, int attribute, int) {
    return cudaDeviceGetAttribute(value, cudaDeviceAttr(attribute), 0);
}
int cuModuleLoadData(void** made, const void*) { *made = (void*)1; return 0; }
int cuModuleGetFunction(void** found, void*, const char* name) {
    names[*found = strdup(name)] = name;
    return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void*) { *value = attribute ? 0 : 1024; return 0; }  // 0: threads
int cuPointerGetAttribute(void* found, int, void* address) {
    if (!contains(on_gpu, address)) return cudaErrorInvalidValue;
    *(void**)found = address;
    return 0;
}
int cuLaunchKernelEx(const DriverLaunch* how, void* function, void**, void**) {
    count_launch(how->stream, names[function]);
    return 0;
}
#define NO_OP(name) int name() { return 0; }
NO_OP(cuCtxSetCurrent) NO_OP(cuCtxGetLimit) NO_OP(cuCtxSetLimit) NO_OP(cuFuncSetAttribute)
NO_OP(cuFuncSetCacheConfig) NO_OP(cuOccupancyMaxActiveClusters) NO_OP(cuTensorMapEncodeTiled)

// cuBLAS
int cublasCreate_v2(void** made) { *made = malloc(1); return 0; }
int cublasSetStream_v2(void* handle, cudaStream_t stream) {
    std::lock_guard guard(lock);
    stream_of[handle] = stream;
    return 0;
}
int cublasGetMathMode(void*, int* found) { *found = 0; return 0; }
int cublasGetPointerMode_v2(void*, int* found) { *found = 0; return 0; }
#define PRODUCT(name) int name(void* handle) { count_launch(stream_of[handle], #name); return 0; }
PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSgemm_v2) PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2) PRODUCT(cublasSgemmEx) PRODUCT(cublasSdot_v2) PRODUCT(cublasDotEx)
#define DESCRIPTOR(name) int name(void** made) { *made = calloc(1, 256); return 0; }
DESCRIPTOR(cublasLtMatmulDescCreate) DESCRIPTOR(cublasLtMatmulPreferenceCreate) DESCRIPTOR(cublasLtMatrixLayoutCreate)
size_t cublasLtGetVersion() { return 130000; }
struct Heuristic { unsigned long algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* best, int* count) {
    memset(best, 0, sizeof *best);
    *count = 1;
    return 0;
}
int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
    const void*, void*, size_t, cudaStream_t stream) {
    count_launch(stream, "cublasLtMatmul");
    return 0;
}

// The cuDNN backend: one engine for all operations, without a workspace
enum { ENGINES = 202, INT64 = 3, BACKEND_DESCRIPTOR = 15 };  // of cudnn_graph.h
const char* cudnnGetErrorString(int) { return "simulated error"; }
int cudnnCreate(void** made) { *made = malloc(1); return 0; }
int cudnnSetStream(void* handle, cudaStream_t stream) { return cublasSetStream_v2(handle, stream); }
int cudnnGetStream(void* handle, cudaStream_t* found) { *found = stream_of[handle]; return 0; }
int cudnnBackendCreateDescriptor(int, void** made) { *made = calloc(1, 256); return 0; }
int cudnnBackendDestroyDescriptor(void* one) { free(one); return 0; }
int cudnnBackendGetAttribute(void*, int name, int type, long, long* count, void* found) {
    if (count) *count = name == ENGINES || type == INT64 || type == BACKEND_DESCRIPTOR;
    if (found && type == INT64) *(long*)found = 0;
    return 0;
}
int cudnnBackendExecute(void* handle, void*, void*) {
    count_launch(stream_of[handle], "cudnnBackendExecute");
    return 0;
}
DESCRIPTOR(cudnnCreateConvolutionDescriptor) DESCRIPTOR(cudnnCreateTensorDescriptor)
DESCRIPTOR(cudnnCreateFilterDescriptor) DESCRIPTOR(cudnnCreateActivationDescriptor)
}
