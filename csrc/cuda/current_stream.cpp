#include "current_stream.h"

#include <dlfcn.h>

#include <atomic>

namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// libtorch_cuda.so alone exports the function. torch opens its libraries for itself (RTLD_LOCAL), so they are not in the scope
// that this library's own references are bound in, where a weak one silently stays null; and a NEEDED entry would keep the
// library from loading, and from telling what it holds, beside a torch without CUDA. So it is looked up in the library itself.
CurrentStream find() {
  static std::atomic<CurrentStream> known{nullptr};
  if (CurrentStream found = known.load(std::memory_order_relaxed)) return found;
  constexpr char kName[] = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, kName);  // a torch that is linked into the program
  if (found == nullptr) {
    if (void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY)) {
      found = dlsym(library, kName);
      dlclose(library);  // gives the reference back; torch keeps its own
    }
  }
  known.store(reinterpret_cast<CurrentStream>(found), std::memory_order_relaxed);
  return reinterpret_cast<CurrentStream>(found);
}

}  // namespace

extern "C" {

int32_t lak_cuda_current_stream(int32_t device, void** stream) {
  const CurrentStream current_stream = find();
  return current_stream == nullptr ? -1 : current_stream(device, stream);
}

const char* lak_cuda_torch_problem() {
  return find() != nullptr ? nullptr
                           : "this process has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream (torch's stable "
                             "interface since 2.2): expected a torch with CUDA, loaded before this library is used";
}
}
