// Images of modules: which kernels are in PTX and in native code, and which devices run them.

#include <elf.h>

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

// PTX has its version and target before its entries.
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
        module.entries.emplace(std::string(name, strcspn(name, "( \t\r\n")), Entry{false});
    }
    return SUCCESS;
}

// What ELF says of native code.
constexpr uint16_t MACHINE_CUDA = 190;
// In the flags: the architecture, and whether it is one that no other runs (sm_90a).
constexpr uint32_t ARCHITECTURE = 0xff, IS_ALONE = 0x800;
// In a symbol's `st_other`: a kernel.
constexpr uint8_t IS_ENTRY = 0x10;
// griddepcontrol.wait, in the lowest twelve bits of an instruction of sixteen bytes.
constexpr uint16_t WAIT = 0x82e;

bool has_wait(const char *code, size_t bytes) {
    for (size_t at = 0; at + 16 <= bytes; at += 16) {
        uint16_t word;
        memcpy(&word, code + at, sizeof word);
        if ((word & 0xfff) == WAIT) return true;
    }
    return false;
}

// Code for sm_80 runs on 8.0 and on what is newer of 8; code for sm_90a on 9.0.
CUresult read_native(const char *image, Module &module) {
    const auto &header = *reinterpret_cast<const Elf64_Ehdr *>(image);
    if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != MACHINE_CUDA || header.e_type != ET_EXEC) {
        return refuse(INVALID_IMAGE, "ELF, but no native code of 64 bits");
    }
    int architecture = header.e_flags & ARCHITECTURE, capability = driver().controls.compute_capability;
    bool is_alone = header.e_flags & IS_ALONE;
    bool runs = is_alone ? capability == architecture
                         : capability / 10 == architecture / 10 && capability >= architecture && capability != 87;
    if (!runs) {
        return refuse(NO_BINARY_FOR_GPU, "native code for sm_" + std::to_string(architecture) + (is_alone ? "a" : "") +
                                             " on sm_" + std::to_string(capability));
    }
    if (CUresult status = driver().controls.refuse_native) return refuse(status, "native code was told to be refused");
    const auto *sections = reinterpret_cast<const Elf64_Shdr *>(image + header.e_shoff);
    for (int i = 0; i < header.e_shnum; i++) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const char *names = image + sections[sections[i].sh_link].sh_offset;
        const auto *symbols = reinterpret_cast<const Elf64_Sym *>(image + sections[i].sh_offset);
        for (size_t symbol = 0; symbol < sections[i].sh_size / sizeof(Elf64_Sym); symbol++) {
            const Elf64_Sym &entry = symbols[symbol];
            if (ELF64_ST_TYPE(entry.st_info) != STT_FUNC || !(entry.st_other & IS_ENTRY)) continue;
            const char *code = image + sections[entry.st_shndx].sh_offset + entry.st_value;
            module.entries.emplace(names + entry.st_name, Entry{has_wait(code, entry.st_size)});
        }
    }
    if (module.entries.empty()) return refuse(INVALID_IMAGE, "native code without kernels");
    driver().controls.native_modules++;
    return SUCCESS;
}

}  // namespace

CUresult read_image(const void *image, Module &module) {
    const char *text = static_cast<const char *>(image);
    return strncmp(text, ELFMAG, SELFMAG) == 0 ? read_native(text, module) : read_ptx(text, module);
}

}  // namespace shim
