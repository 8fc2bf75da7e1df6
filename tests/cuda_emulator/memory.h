// What a kernel may touch: the tensors its binding takes pointers of.
#pragma once
#include <stddef.h>

namespace emulator {

void allow(const void* begin, size_t bytes, bool writable, const char* what);
void forget_all();

}  // namespace emulator
