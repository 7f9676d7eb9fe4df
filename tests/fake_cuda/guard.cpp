#include <c10/core/impl/DeviceGuardImplInterface.h>
// A device guard for "cuda" that does nothing: without one, a CPU build of PyTorch refuses fake tensors there.
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
