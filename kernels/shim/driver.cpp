// What every call has in common.

#include "driver.hpp"

namespace shim {

Driver &driver() {
    static Driver *driver = new Driver;
    return *driver;
}

CUresult refuse(CUresult status, const std::string &why) {
    driver().last_error = std::string(driver().calling) + ": " + why;
    return status;
}

bool is_sticky(CUresult status) {
    bool is_trap = status >= HARDWARE_STACK_ERROR && status <= LAUNCH_FAILED;
    return is_trap || status == ECC_UNCORRECTABLE || status == ILLEGAL_ADDRESS || status == LAUNCH_TIMEOUT ||
           status == UNKNOWN;
}

CUresult begin_call(const char *function) {
    Driver &all = driver();
    Controls &controls = all.controls;
    all.calling = function;
    controls.calls++;
    if (controls.calls == controls.fail_at) {
        Context *context = current_context();
        if (context != nullptr && is_sticky(controls.fail_with)) context->lost = controls.fail_with;
        return refuse(controls.fail_with, "call " + std::to_string(controls.calls) + " was told to fail");
    }
    return SUCCESS;
}

CUresult need_context(Context *&context) {
    if (!driver().is_initialised) return refuse(NOT_INITIALIZED, "cuInit comes first");
    context = current_context();
    if (context == nullptr) return refuse(INVALID_CONTEXT, "no context is current");
    // The reason stays in the text.
    return context->lost;
}

}  // namespace shim
