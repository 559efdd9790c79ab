#include "decode/decode_launch.h"

template int lak::launch_decode<lak::BFloat16, 256>(const lak::ZeroGateParams&, cudaStream_t);
