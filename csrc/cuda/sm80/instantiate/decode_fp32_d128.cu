#include "sm80/decode/launch.h"

template int lak::sm80::launch_decode<float, 128>(const lak::ZeroGateParams&, cudaStream_t);
