#include "sm80/forward_launch.h"

template int lak::sm80::launch_forward<lak::Float16, 128>(const lak::ZeroGateParams&, cudaStream_t);
