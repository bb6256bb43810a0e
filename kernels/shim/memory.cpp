// Memory of the device, which is the host's: every allocation has exactly its size, all bits set, so that what was never
// written is not a number, and sanitizers see its ends.

#include <cstdlib>
#include <cstring>

#include "driver.hpp"

namespace shim {

namespace {

size_t used_memory(CUdevice device) {
    size_t bytes = 0;
    for (const auto &[address, allocation] : driver().memory) {
        if (allocation.context->device == device) bytes += allocation.bytes;
    }
    return bytes;
}

// Null where the host has none.
void *allocate(size_t bytes) {
    // A device aligns to 256 bytes.
    void *memory;
    if (posix_memalign(&memory, 256, bytes) != 0) return nullptr;
    return memset(memory, 0xff, bytes);
}

// That these bytes are inside of one allocation of the context.
CUresult check_range(const Context &context, CUdeviceptr address, size_t bytes) {
    if (bytes == 0) return SUCCESS;
    const auto &memory = driver().memory;
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return refuse(INVALID_VALUE, "no device memory at this address");
    auto [begin, allocation] = *std::prev(after);
    if (address - begin >= allocation.bytes) return refuse(INVALID_VALUE, "no device memory at this address");
    if (allocation.context != &context) return refuse(INVALID_VALUE, "memory of another context");
    size_t left = allocation.bytes - (address - begin);
    if (bytes > left) {
        return refuse(INVALID_VALUE, std::to_string(bytes) + " bytes where " + std::to_string(left) + " are left of " +
                                         std::to_string(allocation.bytes));
    }
    return SUCCESS;
}

void *pointer(CUdeviceptr address) { return reinterpret_cast<void *>(address); }

// Work that writes to memory.
template <typename Work>
CUresult enqueue_work(Context &context, CUstream handle, Work work) {
    Stream *stream;
    if (CUresult status = find_stream(context, handle, stream)) return status;
    return enqueue(*stream, [work] {
        work();
        return Outcome{0, ""};
    });
}

// What waits for work, or may, is not done while a graph is captured.
CUresult refuse_capture(Context &context) {
    if (!disturb_captures(context)) return SUCCESS;
    return refuse(STREAM_CAPTURE_UNSUPPORTED, "a stream is capturing");
}

CUresult allocate_pinned(Context &context, void **memory, size_t bytes) {
    if (memory == nullptr || bytes == 0) return refuse(INVALID_VALUE, "no place for the address, or no bytes");
    if (CUresult status = refuse_capture(context)) return status;
    *memory = allocate(bytes);
    if (*memory == nullptr) return refuse(OUT_OF_MEMORY, "the host has no memory");
    driver().pinned.emplace(uintptr_t(*memory), Allocation{&context, bytes});
    return SUCCESS;
}

CUresult release(std::map<uintptr_t, Allocation> &memory, uintptr_t address, Context &context) {
    auto found = memory.find(address);
    if (found == memory.end()) return refuse(INVALID_VALUE, "this address was not allocated, or is free already");
    if (found->second.context != &context) return refuse(INVALID_VALUE, "memory of another context");
    // Freeing waits for what is going on.
    run_all(context);
    // For those who go on reading.
    memset(reinterpret_cast<void *>(address), 0xff, found->second.bytes);
    free(reinterpret_cast<void *>(address));
    memory.erase(found);
    return SUCCESS;
}

}  // namespace

}  // namespace shim

using namespace shim;

API CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    return call_in_context(__func__, [&](Context &context) {
        if (free == nullptr || total == nullptr) return refuse(INVALID_VALUE, "no place for the sizes");
        *total = driver().controls.total_memory;
        size_t used = used_memory(context.device);
        *free = used < *total ? *total - used : 0;
        return SUCCESS;
    });
}

API CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    return call_in_context(__func__, [&](Context &context) {
        if (address == nullptr || bytes == 0) return refuse(INVALID_VALUE, "no place for the address, or no bytes");
        if (CUresult status = refuse_capture(context)) return status;
        size_t used = used_memory(context.device), total = driver().controls.total_memory;
        if (used > total || bytes > total - used) {
            return refuse(OUT_OF_MEMORY, std::to_string(bytes) + " bytes, " + std::to_string(used) + " in use of " +
                                             std::to_string(total));
        }
        void *memory = allocate(bytes);
        if (memory == nullptr) return refuse(OUT_OF_MEMORY, "the host has no memory");
        *address = uintptr_t(memory);
        driver().memory.emplace(uintptr_t(memory), Allocation{&context, bytes});
        return SUCCESS;
    });
}

API CUresult cuMemFree_v2(CUdeviceptr address) {
    return call_to_free_in_context(__func__, [&](Context &context) {
        if (address == 0) return SUCCESS;
        if (CUresult status = refuse_capture(context)) return status;
        return release(driver().memory, address, context);
    });
}

API CUresult cuMemAllocHost_v2(void **memory, size_t bytes) {
    return call_in_context(__func__, [&](Context &context) { return allocate_pinned(context, memory, bytes); });
}

API CUresult cuMemHostAlloc(void **memory, size_t bytes, unsigned) {
    return call_in_context(__func__, [&](Context &context) { return allocate_pinned(context, memory, bytes); });
}

API CUresult cuMemFreeHost(void *memory) {
    return call_to_free_in_context(
        __func__, [&](Context &context) { return release(driver().pinned, uintptr_t(memory), context); });
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    return call_in_context(__func__, [&](Context &context) {
        if (from == nullptr && bytes > 0) return refuse(INVALID_VALUE, "null");
        if (CUresult status = check_range(context, to, bytes)) return status;
        return enqueue_work(context, stream, [=] { memcpy(pointer(to), from, bytes); });
    });
}

API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return call_in_context(__func__, [&](Context &context) {
        if (to == nullptr && bytes > 0) return refuse(INVALID_VALUE, "null");
        if (CUresult status = check_range(context, from, bytes)) return status;
        return enqueue_work(context, stream, [=] {
            memcpy(to, pointer(from), bytes);
            driver().controls.bytes_to_host += bytes;
        });
    });
}

API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return call_in_context(__func__, [&](Context &context) {
        if (CUresult status = check_range(context, to, bytes)) return status;
        if (CUresult status = check_range(context, from, bytes)) return status;
        if (to < from + bytes && from < to + bytes) return refuse(INVALID_VALUE, "the ranges overlap");
        return enqueue_work(context, stream, [=] { memcpy(pointer(to), pointer(from), bytes); });
    });
}

API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    return call_in_context(__func__, [&](Context &context) {
        if (CUresult status = check_range(context, to, bytes)) return status;
        return enqueue_work(context, stream, [=] { memset(pointer(to), value, bytes); });
    });
}
