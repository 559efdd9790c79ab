#include "sm80/backward/launch.h"

template int lak::launch_backward<lak::BFloat16, 128>(const lak::ZeroGateParams&, cudaStream_t);
