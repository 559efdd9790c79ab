#include "sm80/forward_launch.h"

template int lak::launch_forward<float, 128>(const lak::ZeroGateParams&, cudaStream_t);
