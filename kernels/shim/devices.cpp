// The driver, its devices and their contexts.

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "driver.hpp"

namespace shim {

namespace {

// The current contexts of a thread, the current one last.
thread_local std::vector<Context *> context_stack;

CUresult check_device(CUdevice device) {
    if (!driver().is_initialised) return refuse(NOT_INITIALIZED, "cuInit comes first");
    if (device < 0 || device >= driver().controls.device_count) {
        return refuse(INVALID_DEVICE, "no device " + std::to_string(device));
    }
    return SUCCESS;
}

Context *find_context(const Context *handle) {
    auto found = driver().contexts.find(handle);
    return found == driver().contexts.end() ? nullptr : found->second.get();
}

Context *make_context(CUdevice device, uint32_t references) {
    auto owned = std::make_unique<Context>(Context{device, references, SUCCESS, nullptr});
    Context *context = owned.get();
    context->null_stream = std::make_unique<Stream>(Stream{context, {}, nullptr, false});
    driver().contexts.emplace(context, std::move(owned));
    return context;
}

// What an attribute of the device is; 0 where it has none of what is asked for.
int attribute(int number) {
    int capability = driver().controls.compute_capability;
    switch (number) {
        case 1: return 1024;                      // Threads of a block.
        case 2: case 3: return 1024;              // ... in x and y
        case 4: return 64;                        // ... in z
        case 5: return 0x7fffffff;                // Blocks of a grid in x
        case 6: case 7: return 65535;             // ... in y and z
        case 8: return int(SHARED_BYTES);         // Shared memory of a block.
        case 9: return 64 << 10;                  // Constant memory.
        case 10: return int(WARP);                // Threads of a warp.
        case 12: return 64 << 10;                 // Registers of a block.
        case 16: return 108;                      // Multiprocessors.
        case 38: return 40 << 20;                 // Second cache.
        case 39: return 2048;                     // Threads of a multiprocessor.
        case 41: return 1;                        // One address space with the host.
        case 75: return capability / 10;          // Compute capability.
        case 76: return capability % 10;
        case 81: return 164 << 10;                // Shared memory of a multiprocessor.
        case 82: return 64 << 10;                 // Registers of a multiprocessor.
        case 97: return int(SHARED_BYTES_OPT_IN); // Shared memory of a block that asks for it.
        case 106: return 32;                      // Blocks of a multiprocessor.
        default: return 0;
    }
}

}  // namespace

Context *current_context() { return context_stack.empty() ? nullptr : find_context(context_stack.back()); }

void destroy(Context &context) {
    Driver &all = driver();
    run_all(context);
    all.executables.remove_of(&context);
    all.graphs.remove_of(&context);
    all.events.remove_of(&context);
    all.modules.remove_of(&context);
    all.streams.remove_of(&context);
    for (auto *memory : {&all.memory, &all.pinned}) {
        for (auto next = memory->begin(); next != memory->end();) {
            if (next->second.context != &context) {
                ++next;
                continue;
            }
            free(reinterpret_cast<void *>(next->first));
            next = memory->erase(next);
        }
    }
    if (context.references > 0) all.primary.erase(context.device);
    all.contexts.erase(&context);
}

}  // namespace shim

using namespace shim;

API CUresult cuInit(unsigned flags) {
    return call(__func__, [&] {
        if (flags != 0) return refuse(INVALID_VALUE, "flags are 0");
        if (driver().controls.device_count == 0) return refuse(NO_DEVICE, "there is no device");
        driver().is_initialised = true;
        return SUCCESS;
    });
}

API CUresult cuDriverGetVersion(int *version) {
    return call(__func__, [&] {
        if (version == nullptr) return refuse(INVALID_VALUE, "no place for the version");
        *version = driver().controls.driver_version;
        return SUCCESS;
    });
}

API CUresult cuDeviceGetCount(int *count) {
    return call(__func__, [&] {
        if (!driver().is_initialised) return refuse(NOT_INITIALIZED, "cuInit comes first");
        if (count == nullptr) return refuse(INVALID_VALUE, "no place for the count");
        *count = driver().controls.device_count;
        return SUCCESS;
    });
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    return call(__func__, [&] {
        if (device == nullptr) return refuse(INVALID_VALUE, "no place for the device");
        if (CUresult status = check_device(ordinal)) return status;
        *device = ordinal;
        return SUCCESS;
    });
}

API CUresult cuDeviceGetName(char *name, int bytes, CUdevice device) {
    return call(__func__, [&] {
        if (CUresult status = check_device(device)) return status;
        if (name == nullptr || bytes <= 0) return refuse(INVALID_VALUE, "no place for the name");
        std::string text = "SIMT shim " + std::to_string(device);
        size_t length = std::min(text.size(), size_t(bytes) - 1);
        memcpy(name, text.c_str(), length);
        name[length] = 0;
        return SUCCESS;
    });
}

API CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    return call(__func__, [&] {
        if (CUresult status = check_device(device)) return status;
        if (uuid == nullptr) return refuse(INVALID_VALUE, "no place for the UUID");
        memcpy(uuid->bytes, "gemmoe SIMT shim", sizeof uuid->bytes);
        uuid->bytes[15] = char(device);
        return SUCCESS;
    });
}

API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    return call(__func__, [&] {
        if (CUresult status = check_device(device)) return status;
        if (bytes == nullptr) return refuse(INVALID_VALUE, "no place for the size");
        *bytes = driver().controls.total_memory;
        return SUCCESS;
    });
}

API CUresult cuDeviceGetAttribute(int *value, int number, CUdevice device) {
    return call(__func__, [&] {
        if (CUresult status = check_device(device)) return status;
        if (value == nullptr || number <= 0) return refuse(INVALID_VALUE, "attribute " + std::to_string(number));
        *value = attribute(number);
        return SUCCESS;
    });
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return call(__func__, [&] {
        if (CUresult status = check_device(device)) return status;
        if (context == nullptr) return refuse(INVALID_VALUE, "no place for the context");
        auto [found, is_new] = driver().primary.try_emplace(device, nullptr);
        if (is_new) found->second = make_context(device, 0);
        if (found->second->lost != SUCCESS) return found->second->lost;
        found->second->references++;
        *context = found->second;
        return SUCCESS;
    });
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return call_to_free(__func__, [&] {
        if (CUresult status = check_device(device)) return status;
        auto found = driver().primary.find(device);
        if (found == driver().primary.end()) return refuse(INVALID_CONTEXT, "nobody holds the primary context");
        if (found->second->references > 1) {
            found->second->references--;
        } else {
            destroy(*found->second);
        }
        return SUCCESS;
    });
}

API CUresult cuCtxCreate_v2(CUcontext *context, unsigned, CUdevice device) {
    return call(__func__, [&] {
        if (CUresult status = check_device(device)) return status;
        if (context == nullptr) return refuse(INVALID_VALUE, "no place for the context");
        *context = make_context(device, 0);
        context_stack.push_back(*context);
        return SUCCESS;
    });
}

API CUresult cuCtxDestroy_v2(CUcontext handle) {
    return call_to_free(__func__, [&] {
        Context *context = find_context(handle);
        if (context == nullptr) return refuse(INVALID_CONTEXT, "no such context");
        if (context->references > 0) return refuse(INVALID_CONTEXT, "a primary context is released, not destroyed");
        if (current_context() == context) context_stack.pop_back();
        destroy(*context);
        return SUCCESS;
    });
}

API CUresult cuCtxPushCurrent_v2(CUcontext handle) {
    return call(__func__, [&] {
        if (!driver().is_initialised) return refuse(NOT_INITIALIZED, "cuInit comes first");
        Context *context = find_context(handle);
        if (context == nullptr) return refuse(INVALID_CONTEXT, "no such context");
        context_stack.push_back(context);
        return SUCCESS;
    });
}

API CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    return call_to_free(__func__, [&] {
        if (!driver().is_initialised) return refuse(NOT_INITIALIZED, "cuInit comes first");
        if (context_stack.empty()) return refuse(INVALID_CONTEXT, "no context is current");
        if (context != nullptr) *context = context_stack.back();
        context_stack.pop_back();
        return SUCCESS;
    });
}

API CUresult cuCtxGetCurrent(CUcontext *context) {
    return call(__func__, [&] {
        if (!driver().is_initialised) return refuse(NOT_INITIALIZED, "cuInit comes first");
        if (context == nullptr) return refuse(INVALID_VALUE, "no place for the context");
        *context = current_context();
        return SUCCESS;
    });
}

API CUresult cuCtxSetCurrent(CUcontext handle) {
    return call(__func__, [&] {
        if (!driver().is_initialised) return refuse(NOT_INITIALIZED, "cuInit comes first");
        Context *context = find_context(handle);
        if (handle != nullptr && context == nullptr) return refuse(INVALID_CONTEXT, "no such context");
        if (!context_stack.empty()) context_stack.pop_back();
        if (context != nullptr) context_stack.push_back(context);
        return SUCCESS;
    });
}

API CUresult cuCtxGetDevice(CUdevice *device) {
    return call_in_context(__func__, [&](Context &context) {
        if (device == nullptr) return refuse(INVALID_VALUE, "no place for the device");
        *device = context.device;
        return SUCCESS;
    });
}

API CUresult cuCtxSynchronize() {
    return call_in_context(__func__, [&](Context &context) {
        if (invalidate_captures(context)) return refuse(STREAM_CAPTURE_UNSUPPORTED, "a stream is capturing");
        run_all(context);
        return context.lost;
    });
}
