#include "sm80/forward_launch.h"

template int lak::sm80::launch_forward<float, 256>(const lak::ZeroGateParams&, cudaStream_t);
