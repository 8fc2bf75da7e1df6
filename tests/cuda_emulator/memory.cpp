// The emulator's memory checks. Kernels are compiled with -fsanitize=thread, which calls a function
// before each load and store; instead of that sanitizer's library these functions are linked.
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <string.h>

#include "fibers.h"
#include "memory.h"

namespace emulator {
namespace {

struct Region {
  const char *begin, *end;
  bool writable;
  std::string what;
};

std::vector<Region> regions;  // the tensors of the launch
Region image;                 // this library: constants may be read
const char* host_frame;       // of the launcher: kernels' arguments are read from there

constexpr size_t kArena = 512 * 1024, kGap = 256, kStatic = 48 * 1024;
alignas(1024) char arena[kArena];
struct Array {
  const char* name;
  unsigned at, bytes;
  int line;  // of its declaration; 0: extern
};
std::vector<Array> arrays;  // of the block
unsigned used;              // of the arena

// Who last wrote and read a byte of shared memory, and when: in which interval between block
// barriers, and between warp barriers.
constexpr uint32_t kMany = ~0u;
struct Shadow {
  uint64_t written = 0, read = 0;
  uint32_t writer = 0, writer_order = 0, reader = 0, reader_order = 0, reader_warp = 0;
};
std::vector<Shadow> shadow(kArena);

std::string location(const void* code) {
  Dl_info info;
  if (dladdr(code, &info) == 0) return "";
  char command[600], line[400] = "";
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1;
  snprintf(command, sizeof command, "addr2line -s -e '%s' %#zx 2>/dev/null", info.dli_fname,
           static_cast<size_t>(offset));
  if (FILE* said = popen(command, "r")) {
    if (fgets(line, sizeof line, said) == nullptr) line[0] = 0;
    pclose(said);
  }
  line[strcspn(line, " \n")] = 0;
  return line[0] == 0 || line[0] == '?' ? "" : std::string(", ") + line;
}

[[noreturn]] void bad(unsigned bytes, bool write, const void* code, const std::string& why) {
  const std::string said =
      (write ? "writes " : "reads ") + std::to_string(bytes) + " bytes " + why + location(code);
  fail(said.c_str());
}

std::string relative(const char* p, const char* begin, const char* end, const std::string& what) {
  if (p < begin) return std::to_string(begin - p) + " before the start of " + what;
  if (p < end) return "across the end of " + what;
  return std::to_string(p - end) + " beyond the end of " + what;
}

[[noreturn]] void outside(size_t at, unsigned bytes, bool write, const void* code) {
  const Array* nearest = nullptr;
  size_t distance = ~size_t{0};
  for (const Array& array : arrays) {
    const size_t end = array.at + array.bytes;
    const size_t away = at < array.at ? array.at - at : at > end ? at - end : 0;
    if (away < distance) distance = away, nearest = &array;
  }
  if (nearest == nullptr) bad(bytes, write, code, "of shared memory, of which there is none");
  const char* begin = arena + nearest->at;
  const std::string what = std::string("shared array '") + nearest->name + "'";
  bad(bytes, write, code, relative(arena + at, begin, begin + nearest->bytes, what));
}

void touch_shared(const char* p, unsigned bytes, bool write, const void* code) {
  const auto at = static_cast<size_t>(p - arena);
  const Array* found = nullptr;
  for (const Array& array : arrays) {
    if (at >= array.at && at + bytes <= array.at + array.bytes) found = &array;
  }
  if (found == nullptr) outside(at, bytes, write, code);
  const uint32_t self = block->current, warp = self / 32, order = warps[warp].order;
  for (size_t i = at; i < at + bytes; ++i) {
    Shadow& s = shadow[i];
    uint32_t other = kMany;
    const char* did = nullptr;
    if (s.written == block_epoch && s.writer != self &&
        (s.writer / 32 != warp || s.writer_order == order)) {
      did = "wrote", other = s.writer;
    } else if (write && s.read == block_epoch &&
               (s.reader_warp != warp || (s.reader_order == order && s.reader != self))) {
      did = "read", other = s.reader;
    }
    if (did != nullptr) {
      const std::string who = other == kMany ? "other threads" : "thread " + std::to_string(other);
      bad(bytes, write, code,
          "at " + std::to_string(at - found->at) + " of shared array '" + found->name +
              "', which " + who + " " + did + " with no barrier between");
    }
    if (write) {
      s.written = block_epoch, s.writer = self, s.writer_order = order;
    } else if (s.read != block_epoch) {
      s.read = block_epoch, s.reader = self, s.reader_warp = warp, s.reader_order = order;
    } else if (s.reader_warp != warp) {
      s.reader_warp = s.reader = kMany;
    } else if (s.reader_order != order) {
      s.reader = self, s.reader_order = order;
    } else if (s.reader != self) {
      s.reader = kMany;
    }
  }
}

size_t latest;  // of the regions, the one touched last

bool allowed(const Region& r, const char* p, unsigned bytes, bool write) {
  return p >= r.begin && p + bytes <= r.end && (r.writable || !write);
}

void touch_global(const char* p, unsigned bytes, bool write, const void* code) {
  if (latest < regions.size() && allowed(regions[latest], p, bytes, write)) return;
  for (latest = 0; latest < regions.size(); ++latest) {
    if (allowed(regions[latest], p, bytes, write)) return;
  }
  const Region* nearest = nullptr;
  size_t distance = ~size_t{0};
  bool constant = false;
  for (const Region& r : regions) {
    if (p >= r.begin && p + bytes <= r.end) constant = true, nearest = &r;
    const auto away = static_cast<size_t>(p < r.begin ? r.begin - p : p > r.end ? p - r.end : 0);
    if (!constant && away < distance) distance = away, nearest = &r;
  }
  if (constant) bad(bytes, write, code, "of " + nearest->what + ", which is an input");
  const bool near = nearest != nullptr && distance < (1u << 20);
  bad(bytes, write, code,
      near ? relative(p, nearest->begin, nearest->end, nearest->what)
           : std::string("far from every tensor of the launch"));
}

int find_image(dl_phdr_info* info, size_t, void*) {
  const char* self = reinterpret_cast<const char*>(&host_frame);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + part.p_vaddr);
    if (self < begin || self >= begin + part.p_memsz) continue;
    image.begin = reinterpret_cast<const char*>(info->dlpi_addr);
    image.end = begin + part.p_memsz;
    return 1;
  }
  return 0;
}

}  // namespace

void touch(const void* address, unsigned bytes, bool write, const void* code) {
  if (block == nullptr) return;  // the launcher's own code
  const char* p = static_cast<const char*>(address);
  const char* stack = fibers[block->current]->stack.get();
  if (p >= stack && p < stack + kStack) return;
  if (p >= arena && p < arena + kArena) return touch_shared(p, bytes, write, code);
  if (!write && p >= image.begin && p < image.end) return;
  if (!write && p >= host_frame && p < host_frame + kStack) return;
  touch_global(p, bytes, write, code);
}

void allow(const void* begin, size_t bytes, bool writable, const char* what) {
  const char* p = static_cast<const char*>(begin);
  if (p != nullptr && bytes > 0) regions.push_back({p, p + bytes, writable, what});
}

void forget_all() { regions.clear(); }

void begin_launch(const void* frame) {
  host_frame = static_cast<const char*>(frame);
  if (image.begin == nullptr) dl_iterate_phdr(find_image, nullptr);
}

void begin_block() {
  memset(arena, 0xff, used);  // what a kernel reads before it wrote there is NaN
  arrays.clear();
  used = kGap;
  if (block->dynamic_bytes > 0) {
    arrays.push_back({"extern", used, block->dynamic_bytes, 0});
    used += (block->dynamic_bytes + kGap - 1) / kGap * kGap + kGap;
  }
}

void* shared_array(const char* name, unsigned bytes, int line) {
  size_t all = bytes;
  for (const Array& array : arrays) {
    if (array.line == line && strcmp(array.name, name) == 0) return arena + array.at;
    if (array.line != 0) all += array.bytes;
  }
  if (all > kStatic) fail("needs more than 48 KB of static shared memory");
  arrays.push_back({name, used, bytes, line});
  used += (bytes + kGap - 1) / kGap * kGap + kGap;
  return arena + arrays.back().at;
}

void* dynamic_shared() {
  if (block->dynamic_bytes == 0) fail("has no dynamic shared memory");
  return arena + kGap;
}

}  // namespace emulator

// What the compiler calls: the size is in the name.
#define FASTLM_ACCESS(name, bytes, write)                          \
  extern "C" void __tsan_##name(void* p) {                         \
    emulator::touch(p, bytes, write, __builtin_return_address(0)); \
  }
#define FASTLM_ACCESSES(bytes)                       \
  FASTLM_ACCESS(read##bytes, bytes, false)           \
  FASTLM_ACCESS(write##bytes, bytes, true)           \
  FASTLM_ACCESS(unaligned_read##bytes, bytes, false) \
  FASTLM_ACCESS(unaligned_write##bytes, bytes, true) \
  FASTLM_ACCESS(volatile_read##bytes, bytes, false)  \
  FASTLM_ACCESS(volatile_write##bytes, bytes, true)
FASTLM_ACCESSES(1)
FASTLM_ACCESSES(2)
FASTLM_ACCESSES(4)
FASTLM_ACCESSES(8)
FASTLM_ACCESSES(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) {
  emulator::touch(p, static_cast<unsigned>(bytes), false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  emulator::touch(p, static_cast<unsigned>(bytes), true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}

// And what it calls for a pointer that is no multiple of its type's alignment: 16 bytes at once.
struct Misaligned {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(const Misaligned* at, const void*) {
  if (emulator::block == nullptr) return;
  const char* slash = strrchr(at->file, '/');
  const std::string said =
      "meets an address that is no multiple of " + std::to_string(1 << at->log_alignment) + ", " +
      (slash == nullptr ? at->file : slash + 1) + ":" + std::to_string(at->line);
  emulator::fail(said.c_str());
}
