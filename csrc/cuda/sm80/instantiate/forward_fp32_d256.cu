#include "sm80/forward_launch.h"

template int lak::launch_forward<float, 256>(const lak::ZeroGateParams&, cudaStream_t);
