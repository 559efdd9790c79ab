#include "sm80/backward_launch.h"

template int lak::launch_backward<lak::Float16, 128>(const lak::ZeroGateParams&, cudaStream_t);
