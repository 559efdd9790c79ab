// What launchers and the C interface answer; lak_cuda_error of interface.h has the sentences.
#pragma once

enum LakCudaError : int {
  kLakSuccess = 0,
  kLakBadDtype,
  kLakBadHeadDim,
  kLakMisaligned,
  kLakBadSize,
  kLakGridTooLarge,
  kLakDeviceTooOld,
  kLakNoCodeForDevice,
  kLakDriverTooOld,
  kLakOutOfMemory,
  kLakNoWorkspace,
  kLakBadTile,
  kLakCudaError = 1000,  // plus a cudaError_t
};
