#include "sm80/backward/launch.h"

template int lak::sm80::launch_backward<lak::Float16, 64>(const lak::ZeroGateParams&, cudaStream_t);
