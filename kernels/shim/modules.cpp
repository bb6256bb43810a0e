// Modules, functions, launches. A module's image says which kernels it has; what they do is compiled into this library.

#include <algorithm>
#include <cstring>

#include "driver.hpp"

namespace shim {

namespace {

CUresult load(Context &context, CUmodule *module, const void *image) {
    if (module == nullptr || image == nullptr) return refuse(INVALID_VALUE, "no place for the module, or no image");
    const char *text = static_cast<const char *>(image);
    Module loaded{&context, strcmp(text, "shim") == 0, {}, {}};
    if (!loaded.has_every_kernel) {
        if (CUresult status = read_image(image, loaded)) return status;
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

std::string triple(const unsigned (&of)[3]) {
    return "(" + std::to_string(of[0]) + ", " + std::to_string(of[1]) + ", " + std::to_string(of[2]) + ")";
}

CUresult refuse_launch(const Function &function, CUresult status, const std::string &why) {
    return refuse(status, std::string("kernel ") + function.kernel->name + ": " + why);
}

CUresult read_attributes(Context &context, const CUlaunchConfig &config, const Function &function, bool &is_dependent) {
    is_dependent = false;
    if (config.attribute_count > 0 && config.attributes == nullptr) {
        return refuse_launch(function, INVALID_VALUE, "attributes are null");
    }
    for (unsigned i = 0; i < config.attribute_count; i++) {
        const CUlaunchAttribute &attribute = config.attributes[i];
        std::string number = std::to_string(attribute.id);
        if (attribute.id != PROGRAMMATIC_STREAM_SERIALIZATION) {
            return refuse_launch(function, NOT_SUPPORTED, "attribute " + number);
        }
        if (i > 0 || attribute.padding != 0 || attribute.value.number < 0 || attribute.value.number > 1) {
            return refuse_launch(function, INVALID_VALUE, "attribute " + number + " twice, or neither 0 nor 1");
        }
        is_dependent = attribute.value.number == 1;
    }
    if (!is_dependent) return SUCCESS;
    if (driver().controls.compute_capability < 90) {
        return refuse_launch(function, NOT_SUPPORTED, "programmatic stream serialization begins with sm_90");
    }
    if (!function.waits) {
        return refuse_launch(function, INVALID_VALUE, "its code does not wait for the grid before it");
    }
    Stream *stream;
    if (CUresult status = find_stream(context, config.stream, stream)) return status;
    // Edges of graphs have said more than that they are there since then.
    if (stream->capture != nullptr && driver().controls.driver_version < 12030) {
        return refuse_launch(function, NOT_SUPPORTED, "programmatic stream serialization in a graph before CUDA 12.3");
    }
    return SUCCESS;
}

CUresult launch(Context &context, const Function &function, const CUlaunchConfig &config, void **parameters,
                void **extra) {
    Stream *stream;
    if (CUresult status = find_stream(context, config.stream, stream)) return status;
    const Kernel *kernel = function.kernel;
    const auto &[grid_x, grid_y, grid_z] = config.grid;
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_x > 0x7fffffff || grid_y > 65535 || grid_z > 65535) {
        return refuse_launch(function, INVALID_VALUE, "grid " + triple(config.grid));
    }
    // A GPU takes any block up to the kernel's bound; ours are written for one size.
    if (config.block[0] != kernel->threads || config.block[1] != 1 || config.block[2] != 1) {
        std::string threads = std::to_string(kernel->threads);
        return refuse_launch(function, INVALID_VALUE,
                             "block " + triple(config.block) + " where it has " + threads + " threads");
    }
    if (config.shared_bytes > function.shared_limit) {
        return refuse_launch(function, INVALID_VALUE, std::to_string(config.shared_bytes) + " bytes of shared memory");
    }
    if (parameters == nullptr || parameters[0] == nullptr || extra != nullptr) {
        return refuse_launch(function, INVALID_VALUE, "arguments are a pointer to one struct");
    }
    driver().controls.launches++;
    stream->has_computed |= stream->capture == nullptr;
    auto *begin = static_cast<const unsigned char *>(parameters[0]);
    // In words, which are aligned for every struct.
    std::vector<uint64_t> arguments((kernel->argument_bytes + 7) / 8);
    memcpy(arguments.data(), begin, kernel->argument_bytes);
    size_t shared_limit = function.shared_limit - config.shared_bytes;
    return enqueue(*stream, [=, arguments = std::move(arguments), grid_x = grid_x, grid_y = grid_y, grid_z = grid_z] {
        return run(Launch{kernel, arguments.data(), {grid_x, grid_y, grid_z}, shared_limit});
    });
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
        bool waits = !module->has_every_kernel && module->entries.at(name).waits;
        if (known == nullptr) known = std::make_unique<Function>(Function{kernel, SHARED_BYTES, waits});
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
                            unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream,
                            void **parameters, void **extra) {
    return call_in_context(__func__, [&](Context &context) {
        CUlaunchConfig config{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, nullptr, 0};
        Function *function;
        if (CUresult status = find_function(context, handle, function)) return status;
        return launch(context, *function, config, parameters, extra);
    });
}

// The one attribute there is to give: 6, programmatic stream serialization. Blocks then begin while the grid before still
// runs, which is refused of kernels whose native code does not wait for it, and of graphs where they cannot say so.
API CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **extra) {
    return call_in_context(__func__, [&](Context &context) {
        Function *function;
        if (CUresult status = find_function(context, handle, function)) return status;
        if (config == nullptr) return refuse(INVALID_VALUE, "no configuration");
        bool is_dependent;
        if (CUresult status = read_attributes(context, *config, *function, is_dependent)) return status;
        CUresult status = launch(context, *function, *config, parameters, extra);
        if (status == SUCCESS && is_dependent) driver().controls.dependent_launches++;
        return status;
    });
}
