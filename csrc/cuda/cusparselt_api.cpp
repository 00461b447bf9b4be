#include "cusparselt_api.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <tuple>

namespace proxsparse::cusparselt {

namespace {

std::atomic<const Api*> g_api{nullptr};

struct Close {
  void operator()(void* library) const { dlclose(library); }
};

template <class Function>
void find(void* library, const std::string& path, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (!function) throw std::runtime_error(path + " has no function " + name);
}

}  // namespace

const Api& load(const std::string& path) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const Api* loaded = g_api.load()) {
    if (loaded->path == path) return *loaded;
    throw std::runtime_error("cuSPARSELt is already loaded from " + loaded->path);
  }
  // RTLD_LOCAL: PyTorch may have a copy of another version, and neither may see the other's names.
  std::unique_ptr<void, Close> library(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL));
  if (!library) {
    const char* reason = dlerror();
    throw std::runtime_error(reason ? reason : path + " cannot be loaded");
  }
  auto found = std::make_unique<Api>();
  found->path = path;
  Status (*get_property)(int, int*);
  find(library.get(), path, "cusparseLtGetProperty", get_property);
  for (const int property : {kMajorVersion, kMinorVersion, kPatchLevel}) {
    if (get_property(property, &found->version[property]) != kSuccess) {
      throw std::runtime_error(path + " does not tell its version");
    }
  }
  const auto& [major, minor, patch] = found->version;
  if (std::tie(major, minor, patch) < std::make_tuple(0, 8, 0)) {
    throw std::runtime_error(path + " is cuSPARSELt " + std::to_string(major) + "." +
                             std::to_string(minor) + "." + std::to_string(patch) +
                             ": too old, 0.8.0 or later is needed");
  }
#define PROXSPARSE_FIND(name, arguments) find(library.get(), path, #name, found->name);
  PROXSPARSE_CUSPARSELT_FUNCTIONS(PROXSPARSE_FIND)
#undef PROXSPARSE_FIND
  find(library.get(), path, "cusparseLtGetErrorName", found->cusparseLtGetErrorName);
  find(library.get(), path, "cusparseLtGetErrorString", found->cusparseLtGetErrorString);
  // Never unloaded: threads that end at exit still destroy their handles.
  library.release();
  g_api = found.release();
  return *g_api;
}

const Api& api() {
  const Api* loaded = g_api.load(std::memory_order_acquire);
  if (!loaded) throw std::runtime_error("cuSPARSELt was not loaded");
  return *loaded;
}

}  // namespace proxsparse::cusparselt
