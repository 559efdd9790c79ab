#include "sm80/decode/launch.h"

template int lak::sm80::launch_decode<lak::Float16, 64>(const lak::ZeroGateParams&, cudaStream_t);
