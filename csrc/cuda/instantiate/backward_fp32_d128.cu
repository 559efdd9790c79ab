#include "sm80/backward_launch.h"

template int lak::launch_backward<float, 128>(const lak::ZeroGateParams&, cudaStream_t);
