// SPDX-License-Identifier: Apache-2.0
#pragma once
// The functions of c/kvarn.h. A program that does not use kvarn_add_c_library includes this in one file, compiled for
// the lowest processor that it supports, and nowhere else: these are definitions. Without kvarn_add_kernels they have
// the one instruction set of that file. KVARN_C_NO_FILES: without xxhash.h, and without saving and loading.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <kvarn/c/attention.hpp>
#include <kvarn/c/codec.hpp>
#include <kvarn/c/files.hpp>
#include <kvarn/c/layer.hpp>
#include <kvarn/c/pool.hpp>
#include <kvarn/c/sealing.hpp>
#include <kvarn/c/sequences.hpp>
