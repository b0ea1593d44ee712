// The two places in C++ where fake CUDA tensors still need a device: the device guard (absent in a CPU build of PyTorch, real in a CUDA
// build), and the hooks that autograd's engine asks for a context. Once installed, no real CUDA tensor may be used in this process.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>

constexpr auto kCUDA = c10::DeviceType::CUDA;

static c10::Stream default_stream() { return c10::Stream(c10::Stream::DEFAULT, {kCUDA, 0}); }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return {kCUDA, 0}; }
  c10::Device getDevice() const override { return {kCUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return default_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return default_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return default_stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

extern "C" void pretend_install() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(kCUDA)].store(new Guard);
  // The hooks are a singleton that is there already: its table of virtual functions is exchanged.
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(&hooks), static_cast<const void*>(new Hooks), sizeof(void*));
}
