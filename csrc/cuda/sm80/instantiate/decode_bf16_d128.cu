#include "sm80/decode/launch.h"

template int lak::sm80::launch_decode<lak::BFloat16, 128>(const lak::ZeroGateParams&, cudaStream_t);
