#include "sm80/forward_launch.h"

template int lak::launch_forward<lak::BFloat16, 64>(const lak::ZeroGateParams&, cudaStream_t);
