// Modules, functions, launches. A module's text says which kernels it has; what they do is compiled into this library.

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "driver.hpp"

namespace shim {

namespace {

// What follows a directive of PTX that stands for itself, from `text` on: null where there is none.
const char *after_directive(const char *text, const char *directive) {
    size_t length = strlen(directive);
    const char *found = strstr(text, directive);
    while (found != nullptr && !isspace(static_cast<unsigned char>(found[length]))) {
        found = strstr(found + length, directive);
    }
    if (found == nullptr) return nullptr;
    found += length;
    return found + strspn(found, " \t\r\n");
}

// A compiled module would need a GPU; PTX has its version and target before its entries.
CUresult read_ptx(const char *text, Module &module) {
    const char *version = after_directive(text, ".version");
    const char *target = after_directive(text, ".target");
    if (version == nullptr || target == nullptr || strncmp(target, "sm_", 3) != 0) {
        return refuse(strstr(text, ".entry") ? INVALID_PTX : INVALID_IMAGE, "no PTX with a version and a target");
    }
    // A driver for CUDA 12.1 takes PTX 8.1.
    const Controls &controls = driver().controls;
    int major = atoi(version), minor = atoi(version + strcspn(version, ".") + 1);
    int newest = controls.driver_version / 1000 - 4, newest_minor = controls.driver_version % 1000 / 10;
    if (major > newest || (major == newest && minor > newest_minor)) {
        return refuse(UNSUPPORTED_PTX_VERSION, "PTX " + std::to_string(major) + "." + std::to_string(minor) +
                                                   " with a driver for CUDA " +
                                                   std::to_string(controls.driver_version));
    }
    int capability = atoi(target + strlen("sm_"));
    if (capability > controls.compute_capability) {
        return refuse(NO_BINARY_FOR_GPU, "code for sm_" + std::to_string(capability) + " on sm_" +
                                             std::to_string(controls.compute_capability));
    }
    for (const char *name = text; (name = after_directive(name, ".entry"));) {
        module.entries.emplace(name, strcspn(name, "( \t\r\n"));
    }
    return SUCCESS;
}

CUresult load(Context &context, CUmodule *module, const void *image) {
    if (module == nullptr || image == nullptr) return refuse(INVALID_VALUE, "no place for the module, or no image");
    const char *text = static_cast<const char *>(image);
    Module loaded{&context, strcmp(text, "shim") == 0, {}, {}};
    if (!loaded.has_every_kernel) {
        if (CUresult status = read_ptx(text, loaded)) return status;
    }
    *module = driver().modules.add(std::move(loaded));
    return SUCCESS;
}

CUresult find_function(Context &context, CUfunction handle, Function *&function) {
    for (const auto &[key, module] : driver().modules.live) {
        if (module->context != &context) continue;
        for (const auto &[name, candidate] : module->functions) {
            if (candidate.get() != handle) continue;
            function = candidate.get();
            return SUCCESS;
        }
    }
    return refuse(INVALID_HANDLE, "no such function in this context");
}

std::string triple(unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

}  // namespace

}  // namespace shim

using namespace shim;

API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    return call_in_context(__func__, [&](Context &context) { return load(context, module, image); });
}

API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, int *, void **) {
    return call_in_context(__func__, [&](Context &context) { return load(context, module, image); });
}

API CUresult cuModuleUnload(CUmodule handle) {
    return call_to_free_in_context(__func__, [&](Context &context) {
        Module *module = driver().modules.find(handle);
        if (module == nullptr || module->context != &context) return refuse(INVALID_HANDLE, "no such module");
        run_all(context);
        driver().modules.remove(module);
        return SUCCESS;
    });
}

API CUresult cuModuleGetFunction(CUfunction *function, CUmodule handle, const char *name) {
    return call_in_context(__func__, [&](Context &context) {
        if (function == nullptr || name == nullptr) return refuse(INVALID_VALUE, "null");
        Module *module = driver().modules.find(handle);
        if (module == nullptr || module->context != &context) return refuse(INVALID_HANDLE, "no such module");
        if (!module->has_every_kernel && module->entries.count(name) == 0) {
            return refuse(NOT_FOUND, std::string("the module has no entry ") + name);
        }
        const Kernel *kernel = find_kernel(name);
        if (kernel == nullptr) return refuse(NOT_FOUND, std::string("no kernel ") + name + " was compiled for the CPU");
        auto &known = module->functions[name];
        if (known == nullptr) known = std::make_unique<Function>(Function{kernel, SHARED_BYTES});
        *function = known.get();
        return SUCCESS;
    });
}

// The one attribute there is to set: 8, the bytes of shared memory that a launch may ask for.
API CUresult cuFuncSetAttribute(CUfunction handle, int attribute, int value) {
    return call_in_context(__func__, [&](Context &context) {
        Function *function;
        if (CUresult status = find_function(context, handle, function)) return status;
        if (attribute != 8 || value < 0 || size_t(value) > SHARED_BYTES_OPT_IN) {
            return refuse(INVALID_VALUE, "attribute " + std::to_string(attribute) + ", " + std::to_string(value));
        }
        function->shared_limit = std::max(SHARED_BYTES, size_t(value));
        return SUCCESS;
    });
}

API CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream_handle,
                            void **parameters, void **extra) {
    return call_in_context(__func__, [&](Context &context) {
        Function *function;
        Stream *stream;
        if (CUresult status = find_function(context, handle, function)) return status;
        if (CUresult status = find_stream(context, stream_handle, stream)) return status;
        const Kernel *kernel = function->kernel;
        auto refuse_launch = [&](CUresult status, const std::string &why) {
            return refuse(status, std::string("kernel ") + kernel->name + ": " + why);
        };
        if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_x > 0x7fffffff || grid_y > 65535 || grid_z > 65535) {
            return refuse_launch(INVALID_VALUE, "grid " + triple(grid_x, grid_y, grid_z));
        }
        // A GPU takes any block up to the kernel's bound; ours are written for one size.
        if (block_x != kernel->threads || block_y != 1 || block_z != 1) {
            std::string block = "block " + triple(block_x, block_y, block_z);
            return refuse_launch(INVALID_VALUE, block + " where it has " + std::to_string(kernel->threads) + " threads");
        }
        if (shared_bytes > function->shared_limit) {
            return refuse_launch(INVALID_VALUE, std::to_string(shared_bytes) + " bytes of shared memory");
        }
        if (parameters == nullptr || parameters[0] == nullptr || extra != nullptr) {
            return refuse_launch(INVALID_VALUE, "arguments are a pointer to one struct");
        }
        driver().controls.launches++;
        stream->has_computed |= stream->capture == nullptr;
        auto *begin = static_cast<const unsigned char *>(parameters[0]);
        // In words, which are aligned for every struct.
        std::vector<uint64_t> arguments((kernel->argument_bytes + 7) / 8);
        memcpy(arguments.data(), begin, kernel->argument_bytes);
        size_t shared_limit = function->shared_limit - shared_bytes;
        return enqueue(*stream, [=, arguments = std::move(arguments)] {
            return run(Launch{kernel, arguments.data(), {grid_x, grid_y, grid_z}, shared_limit});
        });
    });
}
