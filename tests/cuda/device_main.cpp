// SPDX-License-Identifier: Apache-2.0
// The kernels' tests on a GPU: says which, or that there is none.

#define CATCH_CONFIG_RUNNER
#include "../catch.hpp"

#include <cstdio>

namespace support {
const char* device_name();  // launch.cu; null without a device, and then why_no_device says why
const char* why_no_device();
}  // namespace support

int main(int argc, char** argv)
{
    if (support::device_name() == nullptr) {
        std::printf("skipped: no CUDA device (%s)\n", support::why_no_device());
        return 77;
    }
    std::printf("device: %s\n", support::device_name());
    return Catch::Session().run(argc, argv);
}
