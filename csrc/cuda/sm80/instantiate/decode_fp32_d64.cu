#include "sm80/decode/launch.h"

template int lak::sm80::launch_decode<float, 64>(const lak::ZeroGateParams&, cudaStream_t);
