// Run a package of moba_flex.compile.export without Python.
//
//     run_package model.pt2 inputs.pt outputs.pt
//
// inputs.pt holds a list of tensors, as torch.save writes it; torch.load reads
// outputs.pt, a tuple.

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

static std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error(path + " must be a file that can be read");
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

static int run(const std::string& package, const std::string& from, const std::string& to) {
  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader model(package);
  std::cout << model.get_metadata().at("moba_flex") << '\n';

  std::vector<torch::Tensor> inputs;
  for (const auto& x : torch::pickle_load(read(from)).toList()) {
    // A package does not look at strides.
    inputs.push_back(static_cast<c10::IValue>(x).toTensor().contiguous());
  }
  std::vector<c10::IValue> outputs;
  for (const auto& x : model.run(inputs)) {
    std::cout << x.dtype() << ' ' << x.sizes() << '\n';
    outputs.push_back(x);
  }

  const auto bytes = torch::pickle_save(c10::ivalue::Tuple::create(std::move(outputs)));
  std::ofstream file(to, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw std::runtime_error(to + " must be a path that can be written");
  }
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_package model.pt2 inputs.pt outputs.pt\n";
    return 2;
  }
  try {
    return run(argv[1], argv[2], argv[3]);
  } catch (const c10::Error& error) {
    std::cerr << "run_package: error: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "run_package: error: " << error.what() << '\n';
    return 1;
  }
}
